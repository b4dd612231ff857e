"""Replay of a golden file: recorded inputs and outputs of the meta-step, compared in float64.

The file holds a small T5, a prompt, a regularizer and some tasks with everything that the meta-step
must find for each of them; the JSON of the same name beside it holds the scalars. The comparison runs
the very code that trains. The regularizer's tensors have the reference's names there: the gate's two layers are
`linear_1` and `linear_2`, the transform's matrices `layers.i.{u,v,bias}`, below `mlp.`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from supmer_ray.errors import UserError, first_line
from supmer_ray.meta.step import MetaGradients, MetaStep
from supmer_ray.model.backbone import Backbone
from supmer_ray.model.regularizer import Regularizer
from supmer_ray.tasks.batch import Examples, TaskBatch
from supmer_ray.tasks.types import domain_similarity

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Golden:
    """A golden file, loaded: what the meta-step needs and what it must find."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    backbone: Backbone
    regularizer: Regularizer

    @property
    def tasks(self) -> int:
        return len(self.facts["per_task"])


def load_golden(file: Path) -> Golden:
    """Read `file` (safetensors) and the JSON of the same name.

    Raises:
        UserError: one of the two is missing, unreadable, or lacks a tensor or a value.
    """
    facts_file = file.with_suffix(".json")
    for path in (file, facts_file):
        if not isfile(path):
            raise UserError(
                f"There is no golden file {path} that may be read; give a .safetensors file with its .json beside it."
            )
    try:
        tensors = {name: t.double() if t.is_floating_point() else t for name, t in load_file(file).items()}
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        if not facts["per_task"]:
            raise ValueError("it has no task")
        model = T5ForConditionalGeneration(T5Config(**facts["t5_config"])).double()
        state = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
        missing, unexpected = model.load_state_dict(state, strict=False)
        model.tie_weights()
        tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
        if unexpected or set(missing) - tied or ("lm_head.weight" in missing and not model.config.tie_word_embeddings):
            wrong = (*unexpected, *missing)[0]
            raise UserError(f"{file} does not fit the T5 of {facts_file.name}: see 'backbone.{wrong}'.")
        regularizer = regularizer_from_reference(tensors, prefix="regularizer.").double()
        backbone = Backbone(model, None, str(file))
        backbone.pad = model.config.pad_token_id or 0
        return Golden(tensors, facts, backbone, regularizer)
    except (SafetensorError, StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{file} or its JSON is not a golden file of the meta-step ({first_line(error)}); name another."
        ) from None


def task_batch(golden: Golden, tasks: list[int]) -> tuple[TaskBatch, np.ndarray]:
    """The chosen tasks as one batch, and λ of each of its queries.

    Raises:
        UserError: the recorded decoder read something else than the labels shifted by one.
    """

    def examples(task: int, name: str) -> Examples:
        inputs = golden.tensors[f"task{task}.{name}.input_ids"].tolist()
        labels = golden.tensors[f"task{task}.{name}.labels"].tolist()
        decoder_ids = golden.tensors[f"task{task}.{name}.decoder_input_ids"].tolist()
        if any(read != [golden.backbone.start, *says[:-1]] for read, says in zip(decoder_ids, labels, strict=True)):
            raise UserError(f"task{task}.{name}.decoder_input_ids are not the labels shifted by one; they must be.")
        return Examples.of(inputs, labels)

    support, query, partner = (
        Examples.concat([examples(t, name) for t in tasks]) for name in ("support", "query", "partner")
    )
    similarity = np.array([golden.facts["per_task"][t]["domain_sim"] for t in tasks])
    mixing = torch.cat([golden.tensors[f"task{t}.lambda"] for t in tasks]).numpy()
    return TaskBatch(support, query, partner, similarity), mixing


def meta_gradients(golden: Golden, tasks: list[int], *, token_budget: int = 1 << 30) -> MetaGradients:
    """The meta-step on the chosen tasks of a golden file, in float64."""
    batch, mixing = task_batch(golden, tasks)
    rates = torch.tensor([golden.facts["inner_lr"]], dtype=torch.float64)
    step = MetaStep(golden.backbone, golden.regularizer, token_budget=token_budget)
    return step(golden.tensors["prompt"], rates, batch, mixing)


def recorded_rounding(value: float) -> float:
    """The most by which a recorded scalar can be off because it was recorded in single precision.

    The reference logs a loss as the mean of its mini-batches' float32 losses. Such a number has 24
    significant bits, or a few more after the mean, where a float64 result has 53: it can vouch for no
    more than half a unit in the last float32 place of a mini-batch (which may lie one binade higher).
    """
    numerator, _ = value.as_integer_ratio()
    significant_bits = (abs(numerator) // (numerator & -numerator or 1)).bit_length()
    return float(np.spacing(np.float32(abs(value)))) if 20 <= significant_bits <= 32 else 0.0


def differences(golden: Golden) -> dict[str, float]:
    """The largest absolute difference of each quantity over the tasks, and of the tasks' mean."""
    worst: dict[str, float] = {}

    def compare(quantity: str, found: Tensor | float, expected: Tensor | float) -> None:
        gap = torch.as_tensor(found, dtype=torch.float64) - torch.as_tensor(expected, dtype=torch.float64)
        difference = gap.abs().max().item() - (recorded_rounding(expected) if isinstance(expected, float) else 0.0)
        # A NaN must never look like agreement.
        worst[quantity] = max(worst.get(quantity, 0.0), math.inf if math.isnan(difference) else difference)

    names = regularizer_names(golden.regularizer)
    for task, facts in enumerate(golden.facts["per_task"]):
        found, out = meta_gradients(golden, [task]), f"task{task}.out."
        compare("support gradient g", found.support_gradient[0], golden.tensors[out + "support_gradient"])
        compare("task embedding h", found.task_embedding[0], golden.tensors[out + "encoder_mean"])
        compare("gate z", found.tasks["gate"], golden.tensors[out + "gate"])
        compare("regularized gradient psi", found.update[0], golden.tensors[out + "regularized_gradient"])
        compare("query loss L", found.tasks["query_loss"], facts["query_kl"])
        compare("agreement s", found.tasks["similarity"], facts["qs_sim"])
        compare("gate regularization R", found.tasks["gate_penalty"], facts["reg"])
        compare("domain similarity delta", *_domain_similarity(golden, facts))
        compare("meta-gradient of theta", found.prompt, golden.tensors[out + "meta_gradient.prompt"])
        for name, gradient in zip(names, found.regularizer, strict=True):
            compare("meta-gradient of phi", gradient, golden.tensors[f"{out}meta_gradient.regularizer.{name}"])

    joint = meta_gradients(golden, list(range(golden.tasks)))

    def mean_of(name: str) -> Tensor:
        return torch.stack([golden.tensors[f"task{t}.out.meta_gradient.{name}"] for t in range(golden.tasks)]).mean(0)

    compare("mean meta-gradient of theta", joint.prompt / golden.tasks, mean_of("prompt"))
    for name, gradient in zip(names, joint.regularizer, strict=True):
        compare("mean meta-gradient of phi", gradient / golden.tasks, mean_of(f"regularizer.{name}"))
    return worst


def _domain_similarity(golden: Golden, facts: dict[str, Any]) -> tuple[float, float]:
    centroids = golden.tensors["cluster_centroids"].numpy()
    own, partner = facts["domains"]
    return domain_similarity(centroids[np.atleast_1d(own)], centroids[np.atleast_1d(partner)]), facts["domain_sim"]


def _reference_name(own: str) -> str:
    part, _, rest = own.partition(".")
    if part in ("u", "v", "bias"):
        return f"mlp.layers.{rest}.{part}"
    return f"mlp.{'linear_1' if part == 'gate_in' else 'linear_2'}.{rest}"


def regularizer_names(regularizer: Regularizer) -> list[str]:
    """The reference's name of each parameter, in the order of `regularizer.parameters()`."""
    return [_reference_name(name) for name, _ in regularizer.named_parameters()]


def regularizer_from_reference(tensors: Mapping[str, Tensor], prefix: str) -> Regularizer:
    """A regularizer of the shapes and values found under the reference's names.

    Raises:
        KeyError: a tensor is missing.
    """
    layers = sum(name.startswith(f"{prefix}mlp.layers.") and name.endswith(".u") for name in tensors)
    d_model, rank = tensors[f"{prefix}mlp.layers.0.u"].shape
    gate_hidden = tensors[f"{prefix}mlp.linear_1.weight"].shape[0]
    regularizer = Regularizer(d_model, rank, layers, gate_hidden)
    with torch.no_grad():
        for name, parameter in regularizer.named_parameters():
            value = tensors[prefix + _reference_name(name)]
            parameter.data = value.clone()
    return regularizer
