"""Where the Grafana dashboard cannot be written: one sentence, and nothing left behind."""

from pathlib import Path

import pytest

from supmer_ray.errors import UserError
from supmer_ray.monitoring.dashboard import write_dashboard


def test_a_place_that_is_no_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"^Cannot write into file/.*: .*/file is a file; name another\.$"):
            write_dashboard(Path(place))
    with pytest.raises(UserError, match=r"^A s3://… address was given where a path is needed"):
        write_dashboard(Path("s3://bucket/x"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
