"""What a run's rows hold after a worker was killed."""

from supmer_ray.files import Place
from supmer_ray.meta.record import METRICS_FILE, MetricsLog, add_notice, read_rows


def test_a_notice_stands_behind_whole_rows_and_outlives_a_restart(tmp_path):
    """The killed worker had not finished its last row; the one that is started again goes on from step 1."""
    (tmp_path / METRICS_FILE).write_text('{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n{"kind": "st')
    add_notice(Place(str(tmp_path)), "Worker 0 failed.")
    assert [row["step"] for row in read_rows(tmp_path, "step")] == [1, 2]
    MetricsLog(Place(str(tmp_path)), 1)
    assert [row["step"] for row in read_rows(tmp_path, "step")] == [1]
    assert [row["text"] for row in read_rows(tmp_path, "notice")] == ["Worker 0 failed."]


def test_rows_of_an_object_store_go_there_in_portions_and_lost_steps_are_dropped(tmp_path):
    place = Place(f"file://{tmp_path}/run")
    assert place.remote
    place.filesystem()[0].create_dir(place.filesystem()[1])
    log = MetricsLog(place, 0)
    for step in (1, 2, 3):
        log.write({"kind": "step", "step": step})
    log.flush()
    assert [row["step"] for row in read_rows(place, "step")] == [1, 2, 3]
    MetricsLog(place, 2)
    assert [row["step"] for row in read_rows(place, "step")] == [1, 2]
