"""Installing: what `make` says of a Python that is none of ours, and what the package holds."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_data_file_is_part_of_the_package():
    package = ROOT / "supmer_ray"
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["supmer_ray"]
    files = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    data = {file for file in files if file.suffix != ".py"}
    assert data and data == {file for pattern in globs for file in package.glob(pattern)}


def test_another_python_is_refused_before_anything_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    other = tmp_path / "python3.10"
    old = "import sys; sys.version_info = (3, 10, 4); exec(sys.argv[1])"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{old}" "$2"\n')
    other.chmod(0o755)
    command = ["make", "test", f"PYTHON={other}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    sentence = f"{other} is Python 3.10, and this needs 3.11 or 3.12; name one, as in: make test PYTHON=python3.11"
    assert done.stderr.splitlines()[0] == sentence
    assert not (tmp_path / ".venv").exists()
