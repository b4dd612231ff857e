"""`supmer doctor` on a real cluster: what it has, and what a run would use."""

import platform
import re
from importlib.metadata import version

import pytest

from supmer_ray.cli import main


def test_doctor_describes_the_machine_and_the_cluster(ray_cluster, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 0
    told = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["python"] == platform.python_version()
    assert told["ray"] == version("ray") and told["torch"] == version("torch")
    assert re.fullmatch(r"1 nodes?, 2 CPUs, \d GPUs", told["cluster"])
    assert re.fullmatch(r"1 worker on a (CPU|GPU), 1 builder of meta-tasks", told["a default run"])
    assert "CPUs" in told["this machine"] and told["embedded backbone"].startswith(told["cache"])
