"""Which tasks a comparison runs over, and along which setting: suites and curves as data.

An entry of a suite is a task, or a task to adapt on with the tasks to test on (domain generalization). A
curve is one setting and its values; the whole comparison is made at each of them.
"""

from __future__ import annotations

from os.path import isfile
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, field_validator

from supmer_ray.fewshot import builtin
from supmer_ray.reading import Section


class SuiteEntry(Section):
    """One task to adapt on.

    Attributes:
        train: name or YAML file of the task that gives the K examples a class and the dev split.
        test: tasks with the same labels whose test rows are scored; unset: the task's own.
        max_shots: the largest K that the data has rows for; a larger one is lowered to it.
    """

    train: str
    test: tuple[str, ...] = ()
    max_shots: int | None = Field(None, ge=1)

    @field_validator("test")
    @classmethod
    def _each_once(cls, test: tuple[str, ...]) -> tuple[str, ...]:
        for name in test:
            if test.count(name) > 1:
                raise ValueError(f"'{name}' is listed twice")
        return test

    @property
    def targets(self) -> tuple[str, ...]:
        return self.test or (self.train,)


class Suite(Section):
    """Tasks that are reported together."""

    name: str = Field(min_length=1)
    description: str = ""
    tasks: tuple[SuiteEntry, ...] = Field(min_length=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _a_name_is_an_entry(cls, tasks: Any) -> Any:
        if not isinstance(tasks, list | tuple):
            return tasks
        return [{"train": task} if isinstance(task, str) else task for task in tasks]


class Curve(Section):
    """One setting of the comparison and the values it takes: "adapt.shots", "run.prompt.length", "prepare.domains"."""

    name: str = Field(min_length=1)
    description: str = ""
    key: str = Field(pattern=r"^(adapt|run|prepare)\.\w+(\.\w+)*$")
    values: tuple[JsonValue, ...] = Field(min_length=1)


def load_suite(name: str | Path) -> Suite:
    """A suite from its YAML file, or a built-in one by name.

    Tasks' files that lie where a relative path from the suite's folder says are those; others start where the command
    is given.

    Raises:
        UserError: there is no such file or suite, or a key or value of the YAML is wrong.
    """
    suite = builtin.load(Suite, "suites", name, "suite")
    if (file := builtin.own_file(name)) is None:
        return suite

    def anchored(task: str) -> str:
        beside = file.parent / task
        return str(beside.resolve()) if isfile(beside) else task

    tasks = (
        entry.model_copy(update={"train": anchored(entry.train), "test": tuple(map(anchored, entry.test))})
        for entry in suite.tasks
    )
    return suite.model_copy(update={"tasks": tuple(tasks)})


def load_curve(name: str | Path) -> Curve:
    """A curve from its YAML file, or a built-in one by name.

    Raises:
        UserError: there is no such file or curve, or a key or value of the YAML is wrong.
    """
    return builtin.load(Curve, "curves", name, "curve")
