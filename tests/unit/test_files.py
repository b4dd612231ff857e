"""Places and locks: one process a folder, and files that are whole or not there."""

import errno
import fcntl
import os
import pickle
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from supmer_ray.data.store import read_manifest
from supmer_ray.errors import UserError, require_new_folder, require_writable
from supmer_ray.files import (
    Place,
    held,
    read_sealed,
    require_new_place,
    require_outside,
    seal,
    whole_file,
    whole_folder,
)


def test_a_folder_is_held_by_one_process(tmp_path):
    folder = tmp_path / "run"
    hold = f"""
from pathlib import Path
from urllib.parse import quote
from supmer_ray.files import held
with held(Path({str(folder)!r}), "a run"):
    print("held", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="a run is going on"), held(folder, "a run"):
            pass
    finally:
        other.kill()
        other.wait()
    # Killed, it could not tidy up; its lock ended with it.
    with held(folder, "a run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"Cannot write into .*file .*; name another folder"),
        held(tmp_path / "file" / "a", "a run"),
    ):
        pass


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_work_goes_on_without(tmp_path, monkeypatch, answer):
    def refuse(stream, operation):
        raise OSError(answer, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path / "run", "a run"), held(tmp_path / "run", "a run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_fails_otherwise_is_told(tmp_path, monkeypatch):
    def fail(stream, operation):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="the disk is broken"), held(tmp_path / "run", "a run"):
        pass


def test_an_object_store_is_not_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with held("s3://bucket/run", "a run"), held(Place("s3://bucket/run"), "a run"):
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
    with pytest.raises(UserError, match=r"/run already holds a run; choose another, or add --overwrite"):
        require_new_place(place, overwrite=False, marker="x")
    with pytest.raises(UserError, match=r"/run is not empty; choose another, or add --overwrite to replace it or --r"):
        require_new_place(place, overwrite=False, can_resume=True)
    with pytest.raises(UserError, match=r"else than this command writes \(run\.json is missing\); name another\.$"):
        require_new_place(place, overwrite=False, can_resume=True, marker="run.json")
    (place / "x").remove()
    place.remove()
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
    with pytest.raises(AssertionError) as refused:
        _ = secret.local
    assert "s3://bucket/runs/first" in str(refused.value) and "SECRET" not in str(refused.value)
    with pytest.raises(UserError, match=r"Cannot reach s4://bucket/x"):
        Place("s4://KEY:SECRET@bucket/x").filesystem()
    with pytest.raises(UserError, match=r"Cannot reach s3://bucket/x \(") as refused:
        Place("s3://KEY:SEC/RET@bucket/x").filesystem()
    assert "KEY" not in str(refused.value) and "SEC" not in str(refused.value), "its / should have been %2F"
    with pytest.raises(UserError, match=r"s3://bucket is a whole bucket"):
        require_new_place(Place("s3://bucket?endpoint_override=localhost:1"), overwrite=False, resume=False)
    asked = Place(str(tmp_path / "why?" / "run"))
    assert asked.name == "run" and asked.parent.name == "why?", "a path may hold what ends a URI's"


@pytest.mark.parametrize("name", ["my run", "a%b"])
def test_a_place_whose_name_is_written_otherwise_in_its_uri_is_removed(tmp_path, name):
    place = Place(f"file://{tmp_path}/{quote(name)}")
    (tmp_path / name / "below").mkdir(parents=True)
    place.write("x", "text")
    assert place.read("x") == "text" and (tmp_path / name / "x").is_file()
    place.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_places_of_a_bucket_share_a_client(monkeypatch):
    where = "?endpoint_override=localhost:1&scheme=http&region=us-east-1"
    first, path = Place(f"s3://KEY:SECRET@bucket/runs/my%20run/a%25b{where}").filesystem()
    assert path == "bucket/runs/my run/a%b"
    for other, lies in ((f"s3://KEY:SECRET@bucket{where}", "bucket"), (f"s3://KEY:SECRET@bucket/{where}", "bucket")):
        assert Place(other).filesystem() == (first, lies) and Place(other).filesystem()[0] is first
    for other in (f"s3://KEY:OTHER@bucket/x{where}", f"s3://KEY:SECRET@bucket/x{where}&tls_verify_certificates=0"):
        assert Place(other).filesystem()[0] is not first, "other keys or options"
    assert pickle.loads(pickle.dumps(first)) == first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:2")
    assert Place(f"s3://KEY:SECRET@bucket/x{where}").filesystem()[0] is not first, "the environment names an endpoint"
    assert Place("gs://anonymous@bucket/x%20y").filesystem()[1] == "bucket/x y"


def test_a_number_sign_would_end_an_address(tmp_path):
    with pytest.raises(UserError, match=r"holds a '#', which would end it; write %23"):
        Place(f"file://{tmp_path}/run#1").read("x")


def test_what_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "old").write_text("")
    rename = Path.rename

    def no_second(path, target):
        if ".partial-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", no_second)
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path / "store") as folder:
        (folder / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["store", "store/old"]


def test_what_a_link_leads_to_is_replaced_in_its_place(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("")
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    with whole_folder(tmp_path / "store") as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "store").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "store"]


def test_an_output_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write into .*/file/a/b: .*/file is a file"):
        require_new_folder(tmp_path / "file" / "a" / "b", overwrite=False)
    with pytest.raises(UserError, match="is a volume"):
        require_new_folder(Path("/dev/shm"), overwrite=True)


def test_a_file_may_be_replaced_however_its_path_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("labelled.csv").write_text("")
    require_writable(Path("labelled.csv"))
    with pytest.raises(UserError, match=r"Cannot write into labelled\.csv/a: .*labelled\.csv is a file"):
        require_writable(Path("labelled.csv/a"))


def test_an_object_store_that_does_not_answer():
    gone = Place("s3://KEY:SECRET@bucket/run?endpoint_override=localhost:1&scheme=http&region=us-east-1")
    with pytest.raises(UserError, match=r"^Cannot reach s3://bucket/run \(") as refused:
        require_new_place(gone, overwrite=False, resume=False)
    assert "SECRET" not in str(refused.value)
    with pytest.raises(OSError, match="localhost"):
        gone.read("metrics.jsonl")
    assert gone.glance("metrics.jsonl") is None, "who looks again soon goes on"


@pytest.mark.parametrize("address", ["s3://", "s3:///", "gs://?endpoint_override=localhost:1", "file://"])
def test_a_scheme_alone_is_no_address(address):
    with pytest.raises(UserError, match=r"^The address \w+:///? names no folder; write one behind it"):
        Place.of(address)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("s3://KEY:SECRET@bucket/x", r"^A s3://… address was given where a path is needed"),
        ("~/x", r"^~/x holds a ~, .*; write the path without it\.$"),
    ],
)
def test_an_address_and_a_home_that_the_shell_left_are_no_paths(given, sentence):
    for refuse in (
        lambda place: require_new_folder(place, overwrite=False),
        lambda place: read_sealed(place, "a checkpoint"),
        read_manifest,
    ):
        with pytest.raises(UserError, match=sentence):
            refuse(Path(given))


def test_an_output_that_cannot_be_made_is_told_at_once(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name, sentence in {
        "loop": r"Too many levels of symbolic links\); name another\.$",
        "loop/out": r"Too many levels of symbolic links\); name another\.$",
        "n" * 300 + "/out": r"File name too long\); name another\.$",
        "n" * 245: r": its name is longer than 220 bytes; name another\.$",
        "ä" * 120: r": its name is longer than 220 bytes; name another\.$",
    }.items():
        for refuse in (require_writable, lambda path: require_new_folder(path, overwrite=False)):
            with pytest.raises(UserError, match=rf"^Cannot write into {tmp_path / name}.*{sentence}"):
                refuse(tmp_path / name)
    assert Place.of(tmp_path / "loop").resolved.lies_within(Place.of(tmp_path))
    longest = tmp_path / ("n" * 220)
    require_new_folder(longest, overwrite=False)
    with held(longest, "a run"), Place.of(longest).workshop("last"):
        pass


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    with whole_file(tmp_path / "link" / "x.csv") as scratch:
        scratch.write_text("1")
    assert (tmp_path / "gone" / "x.csv").read_text() == "1" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("caf\udce9", r"^The path .*caf\\udce9 is not UTF-8; give it another name\.$"),
        ("a\0b", r"^The path .*a\\x00b' holds a NUL, which no file's name may; write it without\.$"),
    ],
)
def test_a_name_that_no_record_could_repeat(name, sentence):
    for refuse in (Place, Place.of, lambda name: require_new_folder(Path(name), overwrite=False)):
        with pytest.raises(UserError, match=sentence):
            refuse(name)


def test_the_folder_above_one_below_the_root_is_the_root():
    assert str(Place("/store").parent) == "/" and str(Place("/a/b").parent) == "/a"


def test_what_has_no_checksums_is_another_thing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"is not a checkpoint: its config\.json has no checksums\.$"):
        read_sealed(tmp_path, "a checkpoint")
    for text in ('{"model_type": ', "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is damaged; use another copy of it\.$"):
            read_sealed(tmp_path, "a checkpoint")


def test_what_is_damaged_is_named(tmp_path):
    (tmp_path / "weights").write_text("1")
    seal(tmp_path, {})
    (tmp_path / "weights").write_text("2")
    with pytest.raises(UserError, match=r"weights is damaged .*; use another copy of it\.$"):
        read_sealed(tmp_path, "a snapshot")
    (tmp_path / "weights").unlink()
    with pytest.raises(UserError, match=r"is not whole: weights is missing; use another copy of it\.$"):
        read_sealed(tmp_path, "a snapshot")


def test_no_output_is_replaced_that_holds_an_input(tmp_path):
    out, other = Place.of(tmp_path / "out"), Place.of(tmp_path / "output")
    require_outside(out, {"store": [other], "checkpoint": [], "data": [Place("s3://bucket/out")]})
    with pytest.raises(UserError, match=r"^The store .*/out/store lies within the output .*/out, which --overwrite"):
        require_outside(out, {"store": [other, Place.of(tmp_path / "other" / ".." / "out" / "store")]})
    runs = Place("s3://KEY:SECRET@bucket/runs?region=us-east-1")
    require_outside(runs, {"store": [Place("s3://bucket/runs-2/store")]})
    with pytest.raises(UserError, match=r"^The store s3://bucket/runs/store lies within the output s3://bucket/runs, "):
        require_outside(runs, {"store": [Place("s3://bucket/runs/store")]})


def test_what_lies_in_a_folder_that_may_not_be_entered_is_one_sentence(tmp_path, monkeypatch):
    """Root may enter every folder, so the system's answers are made up."""
    closed = tmp_path / "closed"
    closed.mkdir()
    stat, access = os.stat, os.access

    def refuse(path, *arguments, **options):
        if closed in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    with pytest.raises(UserError, match=r"^Cannot write into .*/closed/out: .*/closed may not be written to; name"):
        require_new_folder(closed / "out", overwrite=False)
    monkeypatch.undo()

    place = Place.of(tmp_path / "unreadable")
    sentence = r"^Cannot reach .*/unreadable \(.*denied\); check its permissions\.$"
    with pytest.raises(UserError, match=sentence), place.answering():
        raise PermissionError(errno.EACCES, "Permission denied")
