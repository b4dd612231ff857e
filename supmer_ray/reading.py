"""YAML, `--set`, and what they make of a schema.

A file or "dotted.key=value" goes in, plain values come out (`read_yaml`, `override`); values and a schema go in, a
checked object comes out (`build`). A mistake is one sentence: the key's full path, where it was written, and what to
write instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from supmer_ray.errors import UserError, nearest
from supmer_ray.files import DEEPEST, within

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Schema = TypeVar("Schema", bound=BaseModel)


class Section(BaseModel):
    """A part of a schema: unknown keys, infinite numbers and truth values for numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_is_a_number(cls, values: Any) -> Any:
        """YAML reads a bare yes as true, which would count as 1; where no number may stand, pydantic refuses it."""
        known = _annotations(cls)
        for name, value in values.items() if isinstance(values, dict) else ():
            types = _types_in(known.get(name))
            truth = _truth_in(value) if {int, float} & types and not {bool, Any} & types else None
            if truth is not None:
                says = "is" if value is truth else "holds"
                raise ValueError(f"'{name}' {says} {str(truth).lower()}; write a number")
        return values


def build(schema: type[Schema], values: object, where: str) -> Schema:
    """Check `values`, which should be a mapping, against `schema`.

    Args:
        where: what the user would open to mend a mistake: a file, or "the command line".

    Raises:
        UserError: an unknown key, an impossible value or a contradiction, with the key's full path.
    """
    try:
        return schema.model_validate(dict(values) if isinstance(values, Mapping) else values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            keys = [str(part) for part in first["loc"]]
            path, known = ".".join(keys), keys_at(schema, keys[:-1])
            elsewhere = " or ".join(f"'{place}'" for place in _places(schema, keys[-1]))
            meant = f"did you mean {elsewhere}?" if elsewhere else nearest(keys[-1], known)
            raise UserError(f"Unknown key '{path}' in {where}; {meant}") from None
        path = ".".join(_written(schema, first["loc"]))
        if first["type"] == "missing":
            what = f"value {first['loc'][-1] + 1} of" if isinstance(first["loc"][-1], int) else "key"
            path = path.rpartition(".")[0] if what != "key" else path
            raise UserError(f"Missing {what} '{path}' in {where}; write it.") from None
        reason = plainly(first)
        got = "" if first["type"] == "value_error" else f", not {first['input']!r}"
        what = f"value for '{path}'" if path else "settings"
        sentence = f"Impossible {what} in {where}: {reason}{got}"
        raise UserError(sentence if sentence.endswith((".", "?")) else f"{sentence}.") from None


def completed(schema: type[BaseModel], values: object, where: str) -> dict[str, Any]:
    """A configuration that was written down once, with the keys that the schema has had since at their defaults.

    Raises:
        UserError: as `build` has it, for example for a key of a later version.
    """
    return build(schema, values, where).model_dump(mode="json", by_alias=True)


def plainly(error: ErrorDetails) -> str:
    """What was wrong, without pydantic's names of Python's types."""
    bounds = error.get("ctx", {})
    match error["type"]:
        case "tuple_type" | "list_type":
            return "write a list, as in [a, b]"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "write keys with their values, as in {key: value}"
        case "path_type":
            return "write a path, in quotes where it is a number"
        case "string_type":
            return "write a text, in quotes where it is a number, a date, or yes or no"
        case "too_short":
            return f"write at least {bounds['min_length']}"
        case "too_long":
            return f"write at most {bounds['max_length']}"
        case "string_too_short":
            return "write a text"
        case "invalid-json-value":
            return "write a number, a text, a list or a section, and a date in quotes"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")


def _places(schema: type[BaseModel], name: str) -> Iterator[str]:
    """The dotted keys below `schema` that end in `name`, but for entries that users name themselves."""
    for key, annotation in _annotations(schema).items():
        if key == name:
            yield key
        below = _section_in(annotation)
        if below and get_origin(annotation) not in (dict, tuple):
            yield from (f"{key}.{place}" for place in _places(below, name))


def keys_at(schema: type[BaseModel], path: Sequence[str]) -> Iterable[str]:
    """The keys that a user may write in the section at `path` of `schema`; none where there is no such section."""
    keys = iter(path)
    for key in keys:
        annotation = _annotations(schema).get(key)
        if get_origin(annotation) in (dict, tuple):
            next(keys, None)  # the user's own name of an entry, or its number
        below = _section_in(annotation)
        if below is None:
            return []
        schema = below
    return _annotations(schema)


def _written(schema: type[BaseModel] | None, location: Sequence[int | str]) -> list[str]:
    """As much of an error's location as a user has written; behind it may stand the kinds that a value may have."""
    path: list[str] = []
    own_name = False
    for part in location:
        known = _annotations(schema) if schema else {}
        if not own_name and isinstance(part, str) and part not in known:
            break
        path.append(str(part))
        if own_name or isinstance(part, int):
            own_name = False
            continue
        annotation = known[part]
        own_name, schema = get_origin(annotation) is dict, _section_in(annotation)
    return path


def _annotations(schema: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section as a user writes them, each with its type."""
    return {field.alias or name: field.annotation for name, field in schema.model_fields.items()}


def _section_in(annotation: object) -> type[BaseModel] | None:
    """The section of "Section", "Section | None", "dict[str, Section]" and "tuple[Section, …]"."""
    return next((part for part in (annotation, *get_args(annotation)) if _is_section(part)), None)


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _types_in(annotation: object) -> set[object]:
    """The plain types in "float | None", "tuple[float, ...]" and "dict[str, float]"."""
    return {annotation}.union(*map(_types_in, get_args(annotation)))


def _truth_in(value: object) -> bool | None:
    """The first true or false that `value` is or holds."""
    if isinstance(value, bool):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((truth for truth in map(_truth_in, parts) if truth is not None), None)


class _Yaml(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [
            key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"
        ]  # << brings what own keys may replace
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise UserError(
                f"the key '{twice}' stands twice below line {node.start_mark.line + 1}; keep one of the two."
            )
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parsed(text: str) -> Any:
    try:
        values = yaml.load(text, _Yaml)
    except RecursionError:
        deep = True
    else:
        deep = not within(values, DEEPEST)
    if deep:
        raise UserError(f"something holds itself, or is nested deeper than {DEEPEST} levels; write it flatter.")
    return values


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping from `file`.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = _parsed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from None
    except UserError as error:
        raise UserError(f"In {file} {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f" near line {line + 1}" if line is not None else ""
        raise UserError(f"{file} is not valid YAML{place}; check its indentation and quotes.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}; write 'key: value' lines instead.")
    return values


def override(
    values: Mapping[str, Any], assignments: Iterable[str], starts: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """`values` with each "dotted.key=value" of `assignments` set; a value is read as YAML.

    Args:
        starts: dotted key of a mapping → what it holds where nothing is written there when an entry of it is set.

    Raises:
        UserError: an assignment without "=", or a key below something that is not a section.
    """
    result = dict(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"--set {assignment} has no '='; write --set key=value, for example --set meta.steps=500.")
        try:
            value = _parsed(text)
            for start, entries in (starts or {}).items():
                if key.startswith(f"{start}.") and not at(result, start):
                    result = assign(result, start, entries)
            result = assign(result, key, value)
        except UserError as error:
            raise UserError(f"In --set {assignment} {error}") from None
        except KeyError as error:
            raise UserError(f"--set {assignment}: '{error.args[0]}' is a value, not a section.") from None
        except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
            raise UserError(f"--set {assignment}: '{text}' is not a YAML value; put it in quotes.") from None
    return result


def at(values: Mapping[str, Any], key: str) -> Any:
    """What stands at a dotted key, or None."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def assign(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`values` with one dotted key set; nothing of the original is changed.

    Raises:
        KeyError: a part of the key that is a value, not a section.
    """
    first, dot, rest = key.partition(".")
    if not dot:
        return {**values, first: value}
    below = values.get(first) or {}
    if not isinstance(below, Mapping):
        raise KeyError(first)
    return {**values, first: assign(below, rest, value)}
