"""The one schema behind YAML files, `--set key=value` overrides and Tune's search spaces.

A `RunConfig` says everything about a meta-training run except where its store and output lie. Every
value is checked when the file is read: an unknown key is refused with the nearest valid one, an
impossible value with the range that is allowed, and two settings that contradict each other by name.
Defaults are the reference's values (SUPMER, appendix A) unless a comment says otherwise; on the embedded backbone,
`supmer train`, `adapt` and `evaluate` start from `embedded/settings.yaml` instead. `reading.py` reads files and
overrides and words the mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from os.path import isdir
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from supmer_ray.errors import nearest
from supmer_ray.reading import Schema, Section, assign, build, keys_at, override, plainly, read_yaml

PAPER_TASK_TYPES = ("nsp", "nss", "scsp", "scss", "scc")
"""The five self-supervised task types of the paper, in its order."""

TASK_TYPES = (*PAPER_TASK_TYPES, "sck")
"""All task types: the paper's, and one for models that never learned to answer by a letter (tasks/types.py)."""


Precision = Literal["float32", "bfloat16", "float64"]

Loss = Literal["vocabulary", "answers"]
"""What an answer must be told from: every word of the vocabulary, position by position of the target, as in the paper;
or the task's own answers alone, where the word of the answer stands."""

GpuShare = Annotated[float, Field(ge=0.001, le=1)]

MicroBatchTokens = Annotated[
    int | None,
    Field(
        ge=64,
        description="encoder tokens, prompt included; unset: 4096 on a CPU, what half of a GPU's memory (its share of "
        "it) holds",
    ),
]

HIGHEST_RATE = 1e6
"""Of any learning rate: far more than is of use, and far less than float32 holds."""

VOCABULARY_ROWS = 5000
"""A prompt starts from random rows of the embedding table with ids below this, unless another limit is given."""


class PromptConfig(Section):
    """The soft prompt θ."""

    length: int = Field(100, ge=1, le=1000, description="P, rows of the prompt")
    vocabulary_rows: int = Field(
        VOCABULARY_ROWS, ge=1, description="θ starts from random rows of the embedding table with ids below this"
    )


class RegularizerConfig(Section):
    """The meta-gradient regularizer ψ_φ (paper, section 3.3)."""

    enabled: bool = Field(True, description="false: ψ is the identity (the paper's ablation without ψ)")
    rank: int | None = Field(None, ge=1, description="rank of a layer; unset: min(1920, d)")
    layers: int = Field(2, ge=1, le=8, description="of ψ, each of low rank")
    gate: bool = Field(True, description="false: z = 0, ψ = ũ (the ablation without gate)")
    gate_hidden: int = Field(24, ge=1, description="hidden units of the gate")
    two_sided: bool = Field(
        False, description="ψ(−g) = −ψ(g): its layers, whose relu lets one sign pass, read g and −g (not in the paper)"
    )


class TasksConfig(Section):
    """The meta-tasks and their mixture."""

    mixture: dict[str, float] = Field(
        default_factory=lambda: dict.fromkeys(PAPER_TASK_TYPES, 1.0),
        description="relative weight of each task type; a type that is left out, as sck is by default, has weight 0",
    )
    tasks_per_step: int = Field(4, ge=1, description="T, meta-tasks in a meta-step over all workers")
    support: int = Field(16, ge=1, description="support examples a task, balanced over its answers")
    query: int = Field(16, ge=1, description="query examples a task, balanced over its answers")
    max_length: int = Field(412, ge=32, description="longest encoder input in tokens, prompt not counted")
    anchor_length: int = Field(389, ge=4, description="longest multiple-choice anchor in tokens")
    candidate_length: int = Field(86, ge=4, description="longest multiple-choice candidate in tokens")

    @property
    def types(self) -> list[str]:
        """The task types with a positive weight, in the order of `TASK_TYPES`."""
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


class CurriculumConfig(Section):
    """The mix-up curriculum (paper, section 3.4): λ ~ Beta(a, a·b), b = (m^s − 1)/(m − 1) + 1e-7."""

    enabled: bool = Field(True, description="false: λ = 1, a task is never mixed with its partner")
    m: float = Field(2.0, gt=1.0, description="base of the curve from similarity s to b")
    a: float = Field(1.0, gt=0.0, description="first parameter of the Beta distribution")
    b: float | None = Field(None, gt=0.0, description="b itself, whatever s is: mix-up without a curriculum")
    ema: float = Field(0.5, gt=0.0, le=1.0, description="weight of the newest similarity in s")


class MetaConfig(Section):
    """The bi-level optimization."""

    steps: int = Field(2000, ge=1, description="meta-steps, over which the outer rates decay")
    inner_steps: int = Field(
        1,
        ge=0,
        le=32,
        description="0: the query loss under θ itself, a prompt that is pre-trained without meta-learning",
    )
    inner_rate: float | tuple[float, ...] | None = Field(
        None, description="α, or one α for each inner step; unset: θ's current outer rate, as in the reference"
    )
    learn_inner_rates: bool = Field(False, description="meta-learn one positive α for each inner step")
    loss: Loss = Field(
        "vocabulary", description="answers: a task's answers are told from each other, not from all words"
    )
    order: Literal["first", "second"] = Field("first", description="second: differentiate through the inner gradient")
    prompt_rate: float = Field(0.1, gt=0, le=HIGHEST_RATE, description="outer Adam rate of θ")
    regularizer_rate: float = Field(1e-4, gt=0, le=HIGHEST_RATE, description="outer Adam rate of φ")
    inner_rate_rate: float = Field(
        1e-2, gt=0, le=HIGHEST_RATE, description="outer Adam rate of log α when inner rates are learned"
    )
    clip: float = Field(1.0, gt=0, description="gradient norm to which θ and φ are clipped, each for itself")
    curriculum: CurriculumConfig = CurriculumConfig()

    @model_validator(mode="after")
    def _rates_fit_steps(self) -> MetaConfig:
        rates = self.inner_rate if isinstance(self.inner_rate, tuple) else (self.inner_rate,)
        if any(rate is not None and not 0 < rate <= HIGHEST_RATE for rate in rates):
            raise ValueError(f"inner_rate {self.inner_rate} must be positive, and {HIGHEST_RATE:,.0f} at most")
        # Without inner steps no rate is used, and PPT stays a setting of a file that lists some.
        if isinstance(self.inner_rate, tuple) and self.inner_steps and len(self.inner_rate) != self.inner_steps:
            raise ValueError(
                f"inner_rate lists {len(self.inner_rate)} rates but inner_steps is {self.inner_steps}; make them equal"
            )
        if self.learn_inner_rates and not self.inner_steps:
            raise ValueError("learn_inner_rates needs inner steps; write inner_steps: 1 or more")
        if self.learn_inner_rates and self.inner_rate is None:
            raise ValueError("learn_inner_rates needs a starting inner_rate; write one, for example inner_rate: 0.1")
        return self


class WorkersConfig(Section):
    """How the run is laid on the cluster."""

    count: int = Field(1, ge=1, description="Ray Train workers; each takes tasks_per_step / count tasks")
    cpus: float = Field(1.0, gt=0, description="CPUs a worker reserves")
    gpu: bool | None = Field(None, description="a GPU, or gpu_share of one, a worker; unset: if the cluster has them")
    gpu_share: GpuShare = Field(
        1.0, description="what a worker takes of its GPU: runs with small models leave most of one idle"
    )
    builders: int = Field(1, ge=1, description="builders of meta-tasks that feed each worker")
    max_failures: int = Field(3, ge=0, description="worker failures that a run survives")
    precision: Precision | None = Field(
        None, description="of the frozen weights; unset: bfloat16 on a GPU, float32 on a CPU"
    )
    tokens_per_micro_batch: MicroBatchTokens = None
    checkpoint_activations: bool = Field(
        False, description="compute activations again in the backward: less memory, a third more work (T5 only)"
    )
    compile_norms: bool = Field(
        False,
        description="CPU: have torch compile the norms, which needs a C++ compiler and helps short texts (T5 only)",
    )

    @model_validator(mode="after")
    def _a_gpu_is_shared_by_runs(self) -> WorkersConfig:
        if self.gpu_share < 1 and self.count > 1:
            raise ValueError(
                f"gpu_share is {self.gpu_share:g} and count is {self.count}, but each of several workers needs a GPU "
                "of its own; write gpu_share: 1"
            )
        return self


class ScheduleConfig(Section):
    """What happens between meta-steps, counted in steps."""

    validate_every: int = Field(100, ge=1, description="validation before the first, every so many, and the last step")
    validation_tasks: int = Field(4, ge=1, description="fixed validation tasks of each type in the mixture")
    checkpoint_every: int = Field(100, ge=1, description="a snapshot every so many steps, and after the last")
    stop_after_bad_steps: int = Field(
        5, ge=1, description="stop after this many steps in a row with a gradient that is not finite"
    )


class MonitoringConfig(Section):
    """Where a run's figures go, beside its metrics file and the cluster's metrics port."""

    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="where rows go as well; mlflow and wandb are extras of the package"
    )


class RunConfig(Section):
    """Everything about a meta-training run except its store and its output folder."""

    seed: int = Field(0, ge=0, lt=2**32, description="of the start and of every meta-task")
    prompt: PromptConfig = PromptConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    tasks: TasksConfig = TasksConfig()
    meta: MetaConfig = MetaConfig()
    workers: WorkersConfig = WorkersConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    monitoring: MonitoringConfig = MonitoringConfig()

    @model_validator(mode="after")
    def _tasks_divide(self) -> RunConfig:
        if self.tasks.tasks_per_step % self.workers.count:
            raise ValueError(
                f"tasks.tasks_per_step is {self.tasks.tasks_per_step} and workers.count is {self.workers.count}; "
                "the tasks of a step must divide evenly over the workers"
            )
        return self


class DimensionConfig(Section):
    """What a sweep tries for one setting: exactly one of the kinds."""

    uniform: tuple[float, float] | None = Field(None, description="a number between the two")
    loguniform: tuple[float, float] | None = Field(None, description="a positive number, each decade as likely")
    int_: tuple[int, int] | None = Field(None, alias="int", description="a whole number, both ends included")
    choice: tuple[Any, ...] | None = Field(None, description="one of these values")
    simplex: tuple[str, ...] | None = Field(
        None, description="weights of these task types, which sum to 1, every such mixture as likely"
    )
    each_inner_step: bool = Field(False, description="a value of its own for each inner step (meta.inner_rate only)")

    @model_validator(mode="after")
    def _one_kind(self) -> DimensionConfig:
        kinds = ("uniform", "loguniform", "int", "choice", "simplex")
        given = [kind for kind in kinds if getattr(self, kind.replace("int", "int_")) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise ValueError(f"write exactly one of {', '.join(kinds)}, not {said}")
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> DimensionConfig:
        for bounds in (self.uniform, self.loguniform, self.int_):
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"the first bound {bounds[0]} must be below the second, {bounds[1]}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform starts at {self.loguniform[0]}; it needs a positive number")
        return self

    @model_validator(mode="after")
    def _there_is_a_choice(self) -> DimensionConfig:
        if self.choice is not None and len(self.choice) < 2:
            raise ValueError("choice needs at least two values")
        return self

    @model_validator(mode="after")
    def _simplex_is_of_task_types(self) -> DimensionConfig:
        if self.simplex is None:
            return self
        for name in self.simplex:
            if name not in TASK_TYPES:
                raise ValueError(f"unknown task type '{name}'; {nearest(name, TASK_TYPES)}")
        if len(set(self.simplex)) < max(2, len(self.simplex)):
            raise ValueError("simplex needs at least two task types, each named once")
        return self

    @model_validator(mode="after")
    def _inner_steps_differ_in_a_number(self) -> DimensionConfig:
        if self.each_inner_step and not (self.uniform or self.loguniform):
            raise ValueError("each_inner_step needs uniform or loguniform")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that span the dimension."""
        if self.simplex:
            return ({name: 1.0 for name in self.simplex},)
        return self.uniform or self.loguniform or self.int_ or self.choice or ()

    @property
    def samples(self) -> tuple[Any, ...]:
        """Values to check against the schema: the ends, all whole numbers between them, or a fraction between them."""
        if self.int_ and self.int_[1] - self.int_[0] < 1000:
            return tuple(range(self.int_[0], self.int_[1] + 1))
        if self.uniform or self.loguniform:
            low, high = self.ends
            return low, low + (high - low) / math.pi, high
        return self.ends


class AdaptConfig(Section):
    """Few-shot adaptation: prompt tuning with ψ fixed, the step chosen on the dev split."""

    shots: int = Field(16, ge=1, description="K, training examples a class; the dev split has as many")
    steps: int = Field(200, ge=1, description="steps of AdamW at most; the dev split chooses among them")
    batch: int = Field(16, ge=1, description="labelled examples a step")
    rate: float = Field(0.1, gt=0, le=HIGHEST_RATE, description="AdamW rate of the prompt")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="gradient norm to which each prompt is clipped")
    loss: Loss = Field("vocabulary", description="answers: the labels' words are told from each other only")
    evaluate_every: int = Field(10, ge=1, description="steps between evaluations on the dev split")
    max_length: int = Field(412, ge=32, description="encoder tokens of an example, prompt not counted")
    max_test: int | None = Field(
        None, ge=1, description="score at most this many test examples, the same for all seeds"
    )


class ObjectiveConfig(Section):
    """What a sweep makes best: validation loss (lowest), or the dev accuracy of a few-shot task (highest)."""

    task: str | None = Field(
        None, description="a task's name or YAML file; unset: mean validation loss, every task type weighing the same"
    )
    seeds: int = Field(2, ge=1, description="data seeds of the few-shot task, averaged")
    adapt: AdaptConfig = Field(AdaptConfig(steps=50), description="how the few-shot task is adapted to")

    @property
    def mode(self) -> Literal["min", "max"]:
        return "max" if self.task else "min"


class AshaConfig(Section):
    """Asynchronous successive halving: of the trials that reach a rung, only the best go on."""

    grace_steps: int = Field(ge=1, description="meta-steps that every trial gets")
    reduction: float = Field(3.0, gt=1, description="one trial in so many goes on from a rung to the next")


class PbtConfig(Section):
    """Population-based training: every so often, poor trials go on from a good one's snapshot with other rates."""

    every_steps: int = Field(ge=1, description="meta-steps between two exchanges")
    quantile: float = Field(0.25, gt=0, le=0.5, description="share of the trials that is poor, and that is good")
    resample: float = Field(0.25, ge=0, le=1, description="how often a new rate is drawn anew, not changed by a fifth")


LIVE_KEYS = (
    "meta.inner_rate",
    "meta.prompt_rate",
    "meta.regularizer_rate",
    "meta.inner_rate_rate",
    "meta.clip",
    "meta.curriculum.m",
    "meta.curriculum.a",
    "meta.curriculum.ema",
)
"""Settings that may change in the middle of a run, as population-based training does."""

SWEPT_SECTIONS = ("prompt", "regularizer", "tasks", "meta")


class SweepConfig(Section):
    """A search: where it starts, which settings it varies, how it chooses them, and what is best."""

    base: RunConfig = Field(RunConfig(), description="the settings that all trials share")
    space: dict[str, DimensionConfig] = Field(min_length=1, description="dotted key of a setting: what to try")
    search: Literal["random", "tpe", "pbt"] = Field("tpe", description="how the next trial is chosen")
    samples: int = Field(ge=1, description="trials; with pbt, the population")
    objective: ObjectiveConfig = ObjectiveConfig()
    asha: AshaConfig | None = Field(None, description="unset: every trial runs to its end")
    pbt: PbtConfig | None = Field(None, description="with search: pbt")
    concurrency: int | None = Field(None, ge=1, description="trials at a time; unset: as many as fit the cluster")
    seed: int = Field(0, ge=0, lt=2**32, description="of the search; the runs' own is base.seed")

    @model_validator(mode="after")
    def _space_is_of_settings(self) -> SweepConfig:
        if "meta.loss" in self.space and self.objective.task is None:
            raise ValueError(
                "space tries meta.loss, and validation losses of two kinds cannot be compared; "
                "judge by a few-shot task: objective: {task: …}"
            )
        for key, dimension in self.space.items():
            self._check_key(key, dimension)
            for value in dimension.samples:
                self._check_value(key, value)
        return self

    @model_validator(mode="after")
    def _pbt_goes_with_its_section(self) -> SweepConfig:
        if self.search != "pbt":
            if self.pbt is not None:
                raise ValueError(
                    f"a section pbt but search: {self.search}; write search: pbt, or leave the section out"
                )
        elif self.pbt is None:
            raise ValueError("search: pbt needs a section pbt; write pbt: {every_steps: …}")
        elif self.asha is not None:
            raise ValueError("pbt and asha both decide which trials go on; leave asha out")
        return self

    @model_validator(mode="after")
    def _pbt_changes_what_may_change(self) -> SweepConfig:
        if self.search != "pbt":
            return self
        for key in self.space:
            if key not in LIVE_KEYS:
                raise ValueError(
                    f"pbt changes settings in the middle of a run, which '{key}' cannot bear; "
                    f"it may be one of {', '.join(LIVE_KEYS)}"
                )
        if self.base.meta.learn_inner_rates and "meta.inner_rate" in self.space:
            raise ValueError("meta.learn_inner_rates learns what pbt would set by meta.inner_rate; switch one off")
        return self

    @model_validator(mode="after")
    def _pbt_has_a_population(self) -> SweepConfig:
        if self.search != "pbt":
            return self
        if self.base.workers.count > 1:
            raise ValueError("pbt hands snapshots between trials that are one worker each; set base.workers.count: 1")
        if self.samples < 2:
            raise ValueError("pbt needs a population of at least two; write samples: 4")
        if self.concurrency is not None and self.concurrency < self.samples:
            raise ValueError("pbt needs its whole population at a time; leave concurrency out")
        return self

    @model_validator(mode="after")
    def _trials_are_judged_when_they_report(self) -> SweepConfig:
        for name, steps in (
            ("asha.grace_steps", self.asha and self.asha.grace_steps),
            ("pbt.every_steps", self.pbt and self.pbt.every_steps),
        ):
            if steps and steps % self.base.schedule.validate_every:
                raise ValueError(
                    f"{name} is {steps}, but trials report every {self.base.schedule.validate_every} steps "
                    "(base.schedule.validate_every); write a multiple of that"
                )
            if steps and steps > self.base.meta.steps:
                raise ValueError(f"{name} is {steps}, more than the {self.base.meta.steps} steps of a trial")
        return self

    def _check_key(self, key: str, dimension: DimensionConfig) -> None:
        *sections, last = key.split(".")
        if sections and sections[0] in RunConfig.model_fields and sections[0] not in SWEPT_SECTIONS:
            raise ValueError(f"'{key}' is not searched; only {', '.join(SWEPT_SECTIONS)} are")
        known = list(keys_at(RunConfig, sections))
        if last not in known:
            if key.startswith("tasks.mixture."):
                raise ValueError("the mixture is searched as a whole; write tasks.mixture: {simplex: [nsp, …]}")
            raise ValueError(f"unknown setting '{key}' in space; {nearest(last, known or SWEPT_SECTIONS)}")
        if below := next(iter(keys_at(RunConfig, [*sections, last])), None):
            raise ValueError(f"'{key}' is a section; search its keys, as in '{key}.{below}'")
        if key == "meta.steps" or not sections:
            raise ValueError(f"'{key}' is not searched: it must be the same for all trials that are compared")
        if (dimension.simplex is not None) != (key == "tasks.mixture") and not (
            key == "tasks.mixture" and dimension.choice
        ):
            raise ValueError("simplex is for tasks.mixture, and tasks.mixture takes simplex or choice")
        if dimension.each_inner_step and key != "meta.inner_rate":
            raise ValueError(f"each_inner_step is for meta.inner_rate, not for '{key}'")

    def _check_value(self, key: str, value: Any) -> None:
        """A value that RunConfig refuses, whatever the others are, is refused now and not in a trial."""
        values = assign(self.base.model_dump(mode="json"), key, value)
        if key == "meta.inner_steps" and "meta.inner_rate" in self.space:
            values["meta"]["inner_rate"] = 1.0  # any one: the space has its own
        try:
            RunConfig.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"space tries {key} = {value!r}: {plainly(error.errors()[0])}") from None


def whole_name(backbone: str) -> str:
    """The name of a backbone as it is understood everywhere: a folder's, by its whole path.

    Workers have other working directories than the process that was told the name.
    """
    return str(Path(backbone).absolute()) if backbone != "embedded" and isdir(backbone) else backbone


BackboneName = Annotated[str, AfterValidator(whole_name)]


class PrepareConfig(Section):
    """How a store is built from text."""

    sources: tuple[str, ...] = Field(
        min_length=1, description="folders, files, URIs, hub:NAME@CONFIG, or names of the catalog"
    )
    backbone: BackboneName = Field("embedded", description="whose tokenizer cuts and whose encoder embeds the text")
    domains: int = Field(250, ge=2, description="clusters of each data family")
    max_documents: int | None = Field(
        None,
        ge=1,
        le=10**12,  # Python counts no further than 2^63 of anything
        description="documents read of each source at most: its first, and of the catalog a sample",
    )
    sentence_length: int = Field(128, ge=8, description="tokens kept of a sentence")
    kmeans_sample: int = Field(200_000, ge=100, description="items that k-means is fitted on; all are assigned")
    embedders: int | None = Field(
        None, ge=1, description="embedding actors, one GPU or CPU each; unset: one for each, at most 8 on CPUs"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of k-means and of the split into train and validation items")

    @model_validator(mode="after")
    def _sample_holds_the_domains(self) -> PrepareConfig:
        if self.kmeans_sample < self.domains:
            raise ValueError(
                f"kmeans_sample is {self.kmeans_sample}, fewer than the {self.domains} domains that k-means is to find"
            )
        return self

    @field_validator("sources")
    @classmethod
    def _each_once(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(sources):
            if name in sources[:number]:
                # Its documents would stand among the train items and among those of validation.
                raise ValueError(f"sources {sources.index(name) + 1} and {number + 1} are the same; name it once")
        return sources


class EvaluateConfig(Section):
    """How methods are compared: the adaptation, and the meta-training of those that have no checkpoint."""

    backbone: BackboneName = Field("embedded", description="'embedded', a folder, or a hub name")
    baseline: str = Field("prompt-tuning", description="the method that the others' differences are taken to")
    pattern: int = Field(0, ge=0, description="which of a task's patterns; one that has fewer uses its last")
    precision: Precision | None = Field(
        None, description="of the frozen weights in adaptation; unset: bfloat16 on a GPU, float32 on a CPU"
    )
    gpu_share: GpuShare = Field(1.0, description="what a cell takes of a GPU: few examples leave most of one idle")
    tokens_per_micro_batch: MicroBatchTokens = None
    adapt: AdaptConfig = AdaptConfig()
    run: RunConfig = RunConfig()
    prepare: PrepareConfig | None = Field(None, description="how to make the store where none is given")


def load_run_config(
    file: Path | None, assignments: Iterable[str] = (), defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """The run's configuration from a YAML file (or `defaults`, or the schema's) and `--set` overrides."""
    return _load(RunConfig, "tasks.mixture", file, assignments, defaults)


def load_evaluate_config(
    file: Path | None, assignments: Iterable[str] = (), defaults: Mapping[str, Any] | None = None
) -> EvaluateConfig:
    """A comparison's configuration from a YAML file (or `defaults`, or the schema's) and `--set` overrides."""
    return _load(EvaluateConfig, "run.tasks.mixture", file, assignments, defaults)


def _load(
    schema: type[Schema],
    mixture: str,
    file: Path | None,
    assignments: Iterable[str],
    defaults: Mapping[str, Any] | None,
) -> Schema:
    """A configuration whose weights of the task types stand at the key `mixture`: one is set among the others."""
    values = override(read_yaml(file) if file else defaults or {}, assignments, {mixture: TasksConfig().mixture})
    return build(schema, values, str(file) if file else "the command line")


def load_sweep_config(file: Path) -> SweepConfig:
    """A sweep's configuration from a search-space file."""
    return build(SweepConfig, read_yaml(file), str(file))
