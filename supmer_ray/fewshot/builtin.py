"""What comes with the package as YAML: a name or the user's own file goes in, a checked object comes out."""

from __future__ import annotations

from importlib import resources
from os.path import isfile
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from supmer_ray.errors import UserError, nearest
from supmer_ray.reading import build, read_yaml

Thing = TypeVar("Thing", bound=BaseModel)


def names(folder: str) -> list[str]:
    """The names that `folder` of this package holds."""
    place = resources.files("supmer_ray.fewshot") / folder
    return sorted(file.name.removesuffix(".yaml") for file in place.iterdir() if file.name.endswith(".yaml"))


def own_file(name: str | Path) -> Path | None:
    """`name` as the user's own YAML file, or None where it is a name of ours."""
    file = Path(name)
    return file if file.suffix.lower() in (".yaml", ".yml") or isfile(file) else None


def load(schema: type[Thing], folder: str, name: str | Path, what: str) -> Thing:
    """The object that `name` stands for: a YAML file, or one of the names in `folder`.

    Args:
        what: "task", "method", for the message.

    Raises:
        UserError: there is neither, or a key or value of the YAML is wrong.
    """
    if file := own_file(name):
        return build(schema, read_yaml(file), str(file))
    known = names(folder)
    if str(name) not in known:
        raise UserError(
            f"There is no {what} '{name}'; name a YAML file or a built-in {what}: {nearest(str(name), known)}"
        )
    with resources.as_file(resources.files("supmer_ray.fewshot") / folder / f"{name}.yaml") as ours:
        return build(schema, read_yaml(ours), f"the built-in {what} '{name}'")
