"""Places and locks: one process a folder, and files that are whole or not there."""

import subprocess
import sys

import pytest

from supmer_ray.errors import UserError
from supmer_ray.files import Place, held, require_new_place


def test_a_folder_is_held_by_one_process(tmp_path):
    folder = tmp_path / "run"
    hold = f"""
from pathlib import Path
from supmer_ray.files import held
with held(Path({str(folder)!r}), "a run"):
    print("held", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="a run is going on"), held(folder, "a run"):
        pass
    other.kill()
    other.wait()
    # Killed, it could not tidy up; its lock ended with it.
    with held(folder, "a run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_places_on_paths_and_in_object_stores(tmp_path):
    place = Place(str(tmp_path / "run"))
    assert not place.remote and place.local == tmp_path / "run" and place.name == "run"
    assert (place / "a").local == tmp_path / "run" / "a" and place.parent.local == tmp_path
    assert place.listed() == [] and place.read("x") is None
    (tmp_path / "run").mkdir()
    place.write("x", "text")
    assert place.read("x") == "text" and place.listed() == ["x"]
    require_new_place(place, overwrite=False, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        require_new_place(place, overwrite=False, resume=False)
    place.delete("x")
    place.parent.delete("run")
    assert not (tmp_path / "run").exists()

    remote = Place("s3://bucket/runs/first/?endpoint_override=localhost:1")
    assert remote.remote and remote.name == "first"
    assert (remote / "x").where == "s3://bucket/runs/first/x?endpoint_override=localhost:1"
    assert remote.parent.where == "s3://bucket/runs?endpoint_override=localhost:1"
    (tmp_path / "kept").touch()
    home = Place(str(tmp_path))
    with pytest.raises(UserError, match=r"run\.json is missing\), so it is not overwritten"):
        require_new_place(home, overwrite=True, resume=False, marker="run.json")
    require_new_place(home, overwrite=True, resume=False, marker="kept")
    secret = Place("s3://KEY:SECRET@bucket/runs/first?endpoint_override=localhost:1")
    assert f"{secret} {secret!r}" == "s3://bucket/runs/first Place('s3://bucket/runs/first')", "no key in a log"
    with pytest.raises(UserError, match=r"cannot be used as a place"):
        Place("s4://bucket/x").filesystem()
