"""A method of few-shot learning as data: what it learns, from where it starts, how it was meta-trained.

All methods share one code path; SUPMER, its baselines and its ablations differ by the settings that their
YAML changes. A new variant is a new YAML, never new code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from supmer_ray.config import AdaptConfig, RunConfig
from supmer_ray.errors import UserError
from supmer_ray.fewshot import builtin
from supmer_ray.reading import Schema, Section, assign, build


class Method(Section):
    """One way to learn a task from K examples a class.

    Attributes:
        learns: what the K examples change: the soft prompt, all weights of the language model (then there
            is no prompt), a linear probe on the frozen encoder, or nothing.
        meta: dotted key → value, changes to the meta-training configuration; None: no meta-training, a
            prompt starts from vocabulary rows and its raw gradient is applied.
        adapt: key → value, changes to the adaptation's configuration.
    """

    name: str = Field(min_length=1)
    description: str = ""
    learns: Literal["prompt", "weights", "probe", "nothing"]
    meta: dict[str, JsonValue] | None = None
    adapt: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _only_prompts_are_meta_trained(self) -> Method:
        if self.meta is not None and self.learns != "prompt":
            raise ValueError(f"meta-training makes a prompt, but the method learns {self.learns}; leave 'meta' out")
        return self

    @model_validator(mode="after")
    def _draws_are_the_comparisons(self) -> Method:
        for key in ("shots", "max_test"):
            if key in self.adapt:
                raise ValueError(f"'{key}' is the same for all methods that are compared; set adapt.{key} for all")
        return self

    def run_config(self, base: RunConfig) -> RunConfig:
        """`base` with this method's changes: how its prompt is meta-trained.

        Raises:
            UserError: a change that does not fit the schema or the other settings.
        """
        return changed(base, self.meta or {}, f"method '{self.name}'")

    def adapt_config(self, base: AdaptConfig) -> AdaptConfig:
        """`base` with this method's changes.

        Raises:
            UserError: a change that does not fit the schema.
        """
        return changed(base, self.adapt, f"method '{self.name}'")


def changed(section: Schema, changes: Mapping[str, Any], where: str) -> Schema:
    """`section` with dotted keys set.

    Raises:
        UserError: an unknown key or an impossible value.
    """
    values: dict[str, Any] = section.model_dump()
    for key, value in changes.items():
        try:
            values = assign(values, key, value)
        except KeyError as error:
            raise UserError(f"{where}: '{key}' goes below '{error.args[0]}', which is no section.") from None
    return build(type(section), values, where)


def load_method(name: str | Path) -> Method:
    """A method from its YAML file, or a built-in one by name.

    Raises:
        UserError: there is no such file or method, or a key or value of the YAML is wrong.
    """
    return builtin.load(Method, "methods", name, "method")
