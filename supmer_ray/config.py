"""The one schema behind YAML files, `--set key=value` overrides and Tune's search spaces.

A `RunConfig` says everything about a meta-training run except where its store and output lie. Every
value is checked when the file is read: an unknown key is refused with the nearest valid one, an
impossible value with the range that is allowed, and two settings that contradict each other by name.
Defaults are the reference's values (SUPMER, appendix A) unless a comment says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from supmer_ray.errors import UserError, nearest

TASK_TYPES = ("nsp", "nss", "scsp", "scss", "scc")
"""The five self-supervised task types of the paper, in its order."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptConfig(_Section):
    """The soft prompt θ."""

    length: int = Field(100, ge=1, le=1000, description="P, rows of the prompt")
    vocabulary_rows: int = Field(
        5000, ge=1, description="θ starts from random rows of the embedding table with ids below this"
    )


class RegularizerConfig(_Section):
    """The meta-gradient regularizer ψ_φ (paper, section 3.3)."""

    enabled: bool = Field(True, description="false: ψ is the identity (the paper's ablation without ψ)")
    rank: int | None = Field(None, ge=1, description="rank of a layer; unset: min(1920, d)")
    layers: int = Field(2, ge=1, le=8)
    gate_hidden: int = Field(24, ge=1)


class TasksConfig(_Section):
    """The meta-tasks and their mixture."""

    mixture: dict[str, float] = Field(
        default_factory=lambda: dict.fromkeys(TASK_TYPES, 1.0),
        description="relative weight of each task type; a type that is left out has weight 0",
    )
    tasks_per_step: int = Field(4, ge=1, description="T, meta-tasks in a meta-step over all workers")
    support: int = Field(16, ge=1, description="support examples a task, balanced over its answers")
    query: int = Field(16, ge=1, description="query examples a task, balanced over its answers")
    max_length: int = Field(412, ge=32, description="longest encoder input in tokens, prompt not counted")
    anchor_length: int = Field(389, ge=4, description="longest multiple-choice anchor in tokens")
    candidate_length: int = Field(86, ge=4, description="longest multiple-choice candidate in tokens")

    @property
    def types(self) -> list[str]:
        """The task types with a positive weight, in the paper's order."""
        return [name for name in TASK_TYPES if self.mixture.get(name, 0.0) > 0]

    @model_validator(mode="after")
    def _mixture_is_usable(self) -> TasksConfig:
        for name, weight in self.mixture.items():
            if name not in TASK_TYPES:
                raise ValueError(f"unknown task type '{name}'; {nearest(name, TASK_TYPES)}")
            if weight < 0:
                raise ValueError(f"the weight of '{name}' is {weight}; weights are 0 or more")
        if sum(self.mixture.values()) <= 0:
            raise ValueError("every weight is 0; give at least one task type a positive weight")
        return self


class CurriculumConfig(_Section):
    """The mix-up curriculum (paper, section 3.4): λ ~ Beta(a, a·b), b = (m^s − 1)/(m − 1) + 1e-7."""

    enabled: bool = Field(True, description="false: λ = 1, a task is never mixed with its partner")
    m: float = Field(2.0, gt=1.0, description="base of the curve from similarity s to b")
    a: float = Field(1.0, gt=0.0, description="first parameter of the Beta distribution")
    ema: float = Field(0.5, gt=0.0, le=1.0, description="weight of the newest similarity in s")


class MetaConfig(_Section):
    """The bi-level optimization."""

    steps: int = Field(2000, ge=1, description="meta-steps")
    inner_steps: int = Field(1, ge=1, le=32)
    inner_rate: float | tuple[float, ...] | None = Field(
        None, description="α, or one α for each inner step; unset: θ's current outer rate, as in the reference"
    )
    learn_inner_rates: bool = Field(False, description="meta-learn one α for each inner step (Meta-SGD)")
    order: Literal["first", "second"] = Field("first", description="second: differentiate through the inner gradient")
    prompt_rate: float = Field(0.1, gt=0, description="outer Adam rate of θ")
    regularizer_rate: float = Field(1e-4, gt=0, description="outer Adam rate of φ")
    inner_rate_rate: float = Field(1e-2, gt=0, description="outer Adam rate of log α when inner rates are learned")
    clip: float = Field(1.0, gt=0, description="gradient norm to which θ and φ are clipped, each for itself")
    curriculum: CurriculumConfig = CurriculumConfig()

    @model_validator(mode="after")
    def _rates_fit_steps(self) -> MetaConfig:
        rates = self.inner_rate if isinstance(self.inner_rate, tuple) else (self.inner_rate,)
        if any(rate is not None and rate <= 0 for rate in rates):
            raise ValueError(f"inner_rate {self.inner_rate} must be positive")
        if isinstance(self.inner_rate, tuple) and len(self.inner_rate) != self.inner_steps:
            raise ValueError(
                f"inner_rate lists {len(self.inner_rate)} rates but inner_steps is {self.inner_steps}; make them equal"
            )
        if self.learn_inner_rates and self.inner_rate is None:
            raise ValueError("learn_inner_rates needs a starting inner_rate; write one, for example inner_rate: 0.1")
        return self


class WorkersConfig(_Section):
    """How the run is laid on the cluster."""

    count: int = Field(1, ge=1, description="Ray Train workers; each takes tasks_per_step / count tasks")
    cpus: float = Field(1.0, gt=0, description="CPUs a worker reserves")
    gpu: bool | None = Field(None, description="one GPU a worker; unset: if the cluster has them")
    builders: int = Field(1, ge=1, description="builder actors that feed each worker")
    max_failures: int = Field(3, ge=0, description="worker failures that a run survives")
    precision: Literal["float32", "bfloat16", "float64"] | None = Field(
        None, description="of the frozen weights; unset: bfloat16 on a GPU, float32 on a CPU"
    )
    tokens_per_micro_batch: int = Field(4096, ge=64, description="padded encoder tokens, prompt included")


class ScheduleConfig(_Section):
    """What happens between meta-steps, counted in steps."""

    validate_every: int = Field(100, ge=1)
    validation_tasks: int = Field(4, ge=1, description="fixed validation tasks of each type in the mixture")
    checkpoint_every: int = Field(100, ge=1)
    stop_after_bad_steps: int = Field(
        5, ge=1, description="stop after this many steps in a row with a loss that is not finite"
    )


class RunConfig(_Section):
    """Everything about a meta-training run except its store and its output folder."""

    seed: int = Field(0, ge=0)
    prompt: PromptConfig = PromptConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    tasks: TasksConfig = TasksConfig()
    meta: MetaConfig = MetaConfig()
    workers: WorkersConfig = WorkersConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _tasks_divide(self) -> RunConfig:
        if self.tasks.tasks_per_step % self.workers.count:
            raise ValueError(
                f"tasks.tasks_per_step is {self.tasks.tasks_per_step} and workers.count is {self.workers.count}; "
                "the tasks of a step must divide evenly over the workers"
            )
        return self


class PrepareConfig(_Section):
    """How a store is built from text."""

    sources: tuple[str, ...] = Field(min_length=1)
    backbone: str = "embedded"
    domains: int = Field(250, ge=2)
    max_documents: int | None = Field(None, ge=1, description="stop reading each source after this many documents")
    sentence_length: int = Field(128, ge=8, description="tokens kept of a sentence")
    kmeans_sample: int = Field(200_000, ge=100, description="items that k-means is fitted on; all are assigned")
    embedders: int | None = Field(
        None, ge=1, description="embedding actors, one GPU or CPU each; unset: one for each, at most 8 on CPUs"
    )
    seed: int = Field(0, ge=0)


class AdaptConfig(_Section):
    """Few-shot adaptation (spec: prompt tuning with ψ fixed, dev-split selection)."""

    shots: int = Field(16, ge=1, description="K, training examples a class; the dev split has as many")
    steps: int = Field(200, ge=1)
    batch: int = Field(16, ge=1)
    rate: float = Field(0.1, gt=0, description="AdamW rate of the prompt")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    evaluate_every: int = Field(10, ge=1)
    max_length: int = Field(412, ge=32)
    max_test: int | None = Field(
        None, ge=1, description="score at most this many test examples, the same for all seeds"
    )


Section = TypeVar("Section", bound=BaseModel)


def build(schema: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Check `values` against `schema`.

    Args:
        where: what the user would open to mend a mistake: a file, or "the command line".

    Raises:
        UserError: an unknown key, an impossible value or a contradiction, with the key's full path.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        keys = [str(part) for part in first["loc"]]
        path = ".".join(keys) or "the configuration"
        if first["type"] == "extra_forbidden":
            known = _keys_at(schema, keys[:-1])
            raise UserError(f"Unknown key '{path}' in {where}; {nearest(keys[-1], known)}") from None
        if first["type"] == "missing":
            raise UserError(f"Missing key '{path}' in {where}; write it.") from None
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "value_error" else f", not {first['input']!r}"
        sentence = f"Impossible value for '{path}' in {where}: {reason}{got}"
        raise UserError(sentence if sentence.endswith((".", "?")) else f"{sentence}.") from None


def _keys_at(schema: type[BaseModel], path: list[str]) -> Iterable[str]:
    for key in path:
        annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
        # "Section | None" is a section that may be left out.
        sections = [part for part in (annotation, *get_args(annotation)) if _is_section(part)]
        if not sections:
            return []
        schema = sections[0]
    return schema.model_fields


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping from `file`.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f" near line {line + 1}" if line is not None else ""
        raise UserError(f"{file} is not valid YAML{place}; check its indentation and quotes.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}; write 'key: value' lines instead.")
    return values


def override(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`values` with each "dotted.key=value" of `assignments` set; a value is read as YAML.

    Raises:
        UserError: an assignment without "=", or a key below something that is not a section.
    """
    result: dict[str, Any] = {key: value for key, value in values.items()}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {assignment} has no '='; write --set key=value, for example --set meta.steps=500.")
        *path, last = key.strip().split(".")
        section = result
        for part in path:
            below = section.get(part) or {}
            if not isinstance(below, Mapping):
                raise UserError(f"--set {assignment}: '{part}' is a value, not a section.")
            section[part] = dict(below)
            section = section[part]
        try:
            section[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: '{text}' is not a YAML value; put it in quotes.") from None
    return result


def load_run_config(file: Path | None, assignments: Iterable[str] = ()) -> RunConfig:
    """The run's configuration from a YAML file (or the defaults) and `--set` overrides."""
    values = read_yaml(file) if file else {}
    where = str(file) if file else "the command line"
    return build(RunConfig, override(values, assignments), where)
