"""The embedded backbone: a small real encoder-decoder that needs no model hub.

A name goes in, a folder that `AutoModelForSeq2SeqLM` loads comes out. This package ships a decoder and the upper layers
of an encoder (`weights.safetensors`, see CARD.md), settings that suit them, and a prompt and regularizer that were
meta-trained on them (`learned/`, see learned/CARD.md); what lies below the layers is fetched from the package index.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from supmer_ray.registry import home, writable_home

WEIGHTS = Path(__file__).with_name("weights.safetensors")
"""What was trained, as shipped."""

SETTINGS = Path(__file__).with_name("settings.yaml")
"""An `EvaluateConfig` that suits it: how prompts are meta-trained and adapted on a model this small."""

LEARNED = Path(__file__).with_name("learned")
"""The checkpoint that ships: the meta-trained prompt and regularizer."""


def resolve(name: str) -> str:
    """ "embedded" → the assembled folder in the cache, built on the first call; any other name as it is.

    Raises:
        UserError: the encoder's archive cannot be fetched, or nothing can be written into the cache.
    """
    if name != "embedded":
        return name
    folder = home() / f"embedded-{hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]}"
    if not os.path.exists(folder):
        writable_home()
        from supmer_ray.embedded.assemble import assemble

        assemble(WEIGHTS, folder)
    return str(folder)


def settings_for(backbone: str) -> dict[str, Any]:
    """What `train`, `adapt` and `evaluate` start from on `backbone`: our settings on ours, nothing on any other."""
    # Not at the top: who only loads a backbone asks for `resolve`, and needs no pydantic.
    from supmer_ray.reading import read_yaml

    return read_yaml(SETTINGS) if backbone == "embedded" else {}
