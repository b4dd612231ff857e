"""Everything that a meta-training run learns: how it starts, is updated, saved and resumed.

Mean meta-gradients go in and move θ, φ and, if wanted, the inner rates (Adam, each group clipped for
itself, linear decay: paper, appendix A). A checkpoint is a folder of safetensors and JSON, with a
digest of every file; a run resumed from it goes on bit for bit on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from supmer_ray.config import RunConfig
from supmer_ray.errors import UserError
from supmer_ray.files import Place, Where, seal, write_json
from supmer_ray.meta.run import CHECKPOINT_FORMAT, OPTIMIZER, PROGRESS, PROMPT, REGULARIZER, describe_checkpoint
from supmer_ray.meta.step import MetaGradients
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.regularizer import IdentityRegularizer, Regularizer


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: meta-steps done; the stream goes on with this one.
        similarity: s, None before the first step.
        skipped: steps that were left out because a gradient was not finite.
        bad_in_a_row: how many of them were the latest steps.
    """

    step: int = 0
    similarity: float | None = None
    skipped: int = 0
    bad_in_a_row: int = 0


def make_regularizer(config: RunConfig, d_model: int) -> nn.Module:
    """ψ_φ as configured, freshly initialised from the run's seed; the identity when it is switched off."""
    if not config.regularizer.enabled:
        return IdentityRegularizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        own = config.regularizer
        return Regularizer(d_model, own.rank, own.layers, own.gate_hidden, gated=own.gate, two_sided=own.two_sided)


@dataclass
class MetaState:
    """The learned quantities of a run and their optimizer.

    Attributes:
        prompt: (P, d) θ, float32.
        regularizer: ψ_φ.
        log_rates: (inner steps,) log α; learned only when the configuration says so.
    """

    config: RunConfig
    prompt: nn.Parameter
    regularizer: nn.Module
    log_rates: nn.Parameter
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        meta = self.config.meta
        groups: list[dict[str, Any]] = [{"params": [self.prompt], "lr": meta.prompt_rate}]
        if phi := list(self.regularizer.parameters()):
            groups.append({"params": phi, "lr": meta.regularizer_rate})
        if meta.learn_inner_rates:
            groups.append({"params": [self.log_rates], "lr": meta.inner_rate_rate})
        self.optimizer = torch.optim.Adam(groups)
        self._base_rates = [group["lr"] for group in groups]

    @staticmethod
    def fresh(config: RunConfig, backbone: Backbone) -> MetaState:
        """θ from random vocabulary rows, φ from its initialisation, both from the run's seed."""
        generator = torch.Generator().manual_seed(config.seed)
        prompt = backbone.random_rows(config.prompt.length, config.prompt.vocabulary_rows, generator)
        regularizer = make_regularizer(config, backbone.d_model).to(backbone.device)
        return MetaState(config, nn.Parameter(prompt), regularizer, _log_rates(config, backbone.device))

    @property
    def remaining(self) -> float:
        """The share of the run that is left: the factor of the linear decay."""
        return 1 - self.progress.step / self.config.meta.steps

    def inner_rates(self, *, decayed: bool = True) -> Tensor:
        """α of each inner step; without one of its own, θ's outer rate, now or (not decayed) at the start."""
        if self.config.meta.inner_rate is None:
            rate = self.config.meta.prompt_rate * (self.remaining if decayed else 1.0)
            return torch.full_like(self.log_rates, rate)
        return self.log_rates.detach().exp()

    def gradient_norms(self, mean: MetaGradients) -> dict[str, Tensor]:
        """The norm of each group's gradient before clipping, on the device: of θ, φ and the inner rates as learned."""
        return {name: nn.utils.get_total_norm(own, foreach=True) for name, own in self._gradients(mean).items()}

    def apply(self, mean: MetaGradients, norms: Mapping[str, Tensor]) -> None:
        """One outer update with gradients that are already averaged over all tasks of the step.

        Args:
            norms: what `gradient_norms` says of them.
        """
        gradients = self._gradients(mean)
        for group, base, (name, own) in zip(
            self.optimizer.param_groups, self._base_rates, gradients.items(), strict=True
        ):
            for parameter, gradient in zip(group["params"], own, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            nn.utils.clip_grads_with_norm_(group["params"], self.config.meta.clip, norms[name], foreach=True)
            group["lr"] = base * self.remaining
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self, mean: MetaGradients) -> dict[str, list[Tensor]]:
        """The gradients by the optimizer's groups, in their order."""
        found = {"prompt": [mean.prompt]}
        if mean.regularizer:
            found["regularizer"] = mean.regularizer
        if self.config.meta.learn_inner_rates:
            # Adam moves log α: ∂L/∂log α = α · ∂L/∂α.
            found["inner_rates"] = [mean.inner_rates * self.inner_rates()]
        return found

    def save(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint into an empty `folder`.

        Args:
            identity: what the checkpoint belongs to: the backbone's name and fingerprint, the store's.
        """
        save_file({"prompt": self.prompt.detach().cpu()}, folder / PROMPT)
        if phi := {name: value.detach().cpu().contiguous() for name, value in self.regularizer.named_parameters()}:
            save_file(phi, folder / REGULARIZER)
        moments = {
            f"{number}.{name}": torch.as_tensor(value).cpu().contiguous()
            for number, slots in self.optimizer.state_dict()["state"].items()
            for name, value in slots.items()
        }
        save_file({**moments, "log_rates": self.log_rates.detach().cpu()}, folder / OPTIMIZER)
        write_json(folder / PROGRESS, vars(self.progress))
        seal(folder, {"format": CHECKPOINT_FORMAT, **identity, "run": self.config.model_dump(mode="json")})

    @staticmethod
    def resume(folder: Path, config: RunConfig, backbone: Backbone) -> MetaState:
        """The state that `save` wrote, to go on under `config`.

        Raises:
            UserError: no checkpoint or a damaged one, another backbone or prompt length, or no optimizer in it.
        """
        checkpoint = load_checkpoint(folder, backbone)
        if len(checkpoint.prompt) != config.prompt.length:
            raise UserError(
                f"The checkpoint {folder} holds a prompt of {len(checkpoint.prompt)} rows, but prompt.length is "
                f"{config.prompt.length}; write {len(checkpoint.prompt)}, or start a new run."
            )
        if not (folder / OPTIMIZER).is_file():
            raise UserError(f"{folder} holds no {OPTIMIZER}, so it cannot be resumed; start a new run.")
        tensors = load_file(folder / OPTIMIZER, device=str(backbone.device))
        learned = nn.Parameter(tensors.pop("log_rates"))
        log_rates = learned if config.meta.learn_inner_rates else _log_rates(config, backbone.device)
        progress = Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
        state = MetaState(config, nn.Parameter(checkpoint.prompt), checkpoint.regularizer, log_rates, progress)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, _, slot = name.partition(".")
            # Adam keeps its step counter on the CPU.
            slots.setdefault(int(number), {})[slot] = value.cpu() if slot == "step" else value
        saved = state.optimizer.state_dict()
        saved["state"] = slots
        state.optimizer.load_state_dict(saved)
        return state


def _log_rates(config: RunConfig, device: torch.device) -> nn.Parameter:
    meta = config.meta
    own = meta.inner_rate if meta.inner_steps else None
    rates = meta.prompt_rate if own is None else own
    return nn.Parameter(torch.tensor(rates, device=device).expand(meta.inner_steps).clone().log())


@dataclass(frozen=True)
class Checkpoint:
    """What adaptation needs of a meta-training run.

    Attributes:
        prompt: (P, d) θ.
        regularizer: ψ_φ.
        config: of the run that made them.
        identity: the description that stands in `config.json`.
    """

    prompt: Tensor
    regularizer: nn.Module
    config: RunConfig
    identity: dict[str, Any]


def load_checkpoint(where: Where, backbone: Backbone) -> Checkpoint:
    """Read θ and ψ_φ of the checkpoint in a folder or at a URI and make sure that they belong to `backbone`.

    Raises:
        UserError: no checkpoint, a damaged file, another format, or another backbone.
    """
    place = Place.of(where)
    described = describe_checkpoint(place)
    if described.fingerprint != backbone.fingerprint:
        raise UserError(
            f"The checkpoint {place} was made for the backbone '{described.backbone}', not for '{backbone.name}' "
            f"(other weights); compare or adapt on that backbone, or meta-train for this one."
        )
    config = described.config
    prompt = _tensors(place, PROMPT)["prompt"].to(backbone.device)
    regularizer = make_regularizer(config, backbone.d_model)
    if config.regularizer.enabled:
        regularizer.load_state_dict(_tensors(place, REGULARIZER))
    return Checkpoint(prompt, regularizer.to(backbone.device), config, described.identity)


def _tensors(place: Place, name: str) -> dict[str, Tensor]:
    with place.answering():
        content = place.content(name)
    if content is None:
        raise UserError(f"{place} is not whole: {name} is missing; use another copy of it.")
    return load(content)
