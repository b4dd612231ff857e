"""Names of the reference implementation's checkpoints, so that its regularizers can be read.

Only names: the reference calls the gate's two layers `linear_1` and `linear_2` and the transform's
matrices `layers.i.{u,v,bias}`, below `mlp.`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from supmer_ray.model.regularizer import Regularizer


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
