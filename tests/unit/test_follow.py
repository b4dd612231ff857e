"""What a driver passes on of a metrics file that grows, and that a restarted worker writes anew."""

import json

from supmer_ray.files import Place
from supmer_ray.train import _Follow


def line(step, kind="step", **more):
    return json.dumps({"kind": kind, "step": step, **more}) + "\n"


def test_rows_are_passed_on_once_whole_and_again_where_their_steps_are_made_again(tmp_path):
    file, seen = tmp_path / "metrics.jsonl", []
    follow = _Follow(Place.of(tmp_path), lambda row: seen.append((row["kind"], row["step"])))
    follow.look()
    notice = line(0, "notice", text="A snapshot is damaged.")
    file.write_text(notice + line(1) + line(2)[:9])
    follow.look()
    assert seen == [("notice", 0), ("step", 1)]
    file.write_text(notice + line(1) + line(2) + line(3))
    follow.look()
    assert seen[2:] == [("step", 2), ("step", 3)] and follow.step == 3
    file.write_text(notice + line(1))  # the worker goes on from step 1
    follow.look()
    file.write_text(notice + line(1) + line(2))
    follow.look()
    assert seen[4:] == [("step", 1), ("step", 2)], "what was said once is not said again"
    assert follow.step == 2
