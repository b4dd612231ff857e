"""What a run is to those who start it, do it or watch it: its plan, the notes in its folder, its snapshots.

Neither torch nor transformers is imported here: the driver and Ray Train's controller read this module before any
worker is started, and a worker cannot start before they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from supmer_ray.config import RunConfig
from supmer_ray.errors import UserError
from supmer_ray.files import SEAL, Place, Where, parse_record, read_sealed
from supmer_ray.reading import build

if TYPE_CHECKING:
    from supmer_ray.meta.learner import Learner

CONFIG_FILE = "run.json"
"""How a run was started, and what its folder is known by."""

REFUSAL_FILE = "refused.txt"
"""Where a worker leaves the sentence for a run that no restart could mend."""

STOP_FILE = "stop"
"""Empty, until a driver that was told to stop asks its workers by it to save and end.

It is there from the beginning: a network disk may go on saying for a minute that a file it was asked for is missing.
"""

GROUP_FILE = "placement_group"
"""Where a run within a sweep notes what it has reserved, for the sweep to free if the trial is stopped."""

PROMPT, REGULARIZER, OPTIMIZER = "prompt.safetensors", "regularizer.safetensors", "optimizer.safetensors"
"""Within a snapshot: θ; φ, unless ψ is the identity; Adam's moments and the inner rates."""

CHECKPOINT_FORMAT = 1

PROGRESS = "progress.json"
"""Within a snapshot: where the run stood."""

Objective = Callable[["Learner", dict[str, dict[str, float]]], dict[str, Any]]
"""What a sweep wants to know after each validation: the learner and the validation's figures go in."""


@dataclass(frozen=True)
class RunPlan:
    """One run, as every worker of it is told.

    Attributes:
        store: what `prepare` wrote.
        out: the folder of the metrics file, seen by all nodes.
        validation_types: the task types to validate on; None: those of the mixture.
        objective: reported with a snapshot after each validation, in place of the regular snapshots.
        beside: how many workers share a node, with those of other runs of a sweep.
    """

    config: RunConfig
    store: Place
    out: Place
    validation_types: tuple[str, ...] | None = None
    objective: Objective | None = None
    beside: int = 1


def worker_loop(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        settings: `plan`, the `RunPlan`.
    """
    from supmer_ray.meta.loop import work

    work(settings["plan"])


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself.

    Attributes:
        backbone, fingerprint: the name of the language model that it was made for, and what it must be.
        config: of the run that made it.
        prompt_digest: SHA-256 of θ's file.
        identity: all that stands there.
    """

    backbone: str
    fingerprint: str
    config: RunConfig
    prompt_digest: str
    identity: dict[str, Any]


def describe_checkpoint(where: Where) -> Description:
    """What the checkpoint in a folder or at a URI says of itself, after every file's digest was found right.

    Raises:
        UserError: no checkpoint, another version's, or a damaged one.
    """
    place = Place.of(where)
    sealed = read_sealed(place, "a checkpoint")
    if (found := sealed.get("format")) != CHECKPOINT_FORMAT:
        raise UserError(f"{place} has checkpoint format {found}; this version reads {CHECKPOINT_FORMAT}.")
    match sealed:
        case {"backbone": {"name": str(name), "fingerprint": str(fingerprint)}, "run": dict(run)} if digest := sealed[
            "checksums"
        ].get(PROMPT):
            return Description(name, fingerprint, build(RunConfig, run, str(place / SEAL)), digest, sealed)
    raise UserError(f"{place / SEAL} is damaged; use another copy of it.")


def snapshots_in(run: Place) -> list[Any]:
    """The snapshots that lie in a run's folder, as Ray `Checkpoint`s, the furthest first.

    Their names hold the time of a node's clock, which may be set back, so names decide only between equal steps.
    """
    from ray.train import Checkpoint

    filesystem, path = run.filesystem()
    names = [name for name in run.listed() if name.startswith("checkpoint_") and not name.endswith(".json")]
    steps = {name: step_in(run / name) for name in names}
    # One that was cut short tells no step: it was the last to be written, and whoever reads it says that it is damaged.
    furthest = sorted(names, key=lambda name: (steps[name] if steps[name] >= 0 else math.inf, name), reverse=True)
    return [Checkpoint(f"{path}/{name}", filesystem) for name in furthest]


def step_in(snapshot: Place) -> int:
    """The step that a snapshot was made after; −1 where it does not tell."""
    try:
        return int(parse_record(snapshot.read(PROGRESS) or "")["step"])
    except (ValueError, KeyError, TypeError):
        return -1
