"""An adapted task as a folder without a pickle, and labels for new rows from it.

`prompt.safetensors` holds θ; `adapted.json` holds the whole task definition, the backbone's identity,
the settings and how well it did, and the prompt's digest. `predict` turns a file of rows into the
same rows with a label and its probability. Torch is imported when the rows and the folder have been checked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError

from supmer_ray.config import AdaptConfig
from supmer_ray.errors import UserError, require_new_folder, require_path, require_writable
from supmer_ray.fewshot.definition import TaskDefinition
from supmer_ray.fewshot.tables import read_table, require_columns, require_ending, write_table
from supmer_ray.files import parse_record, whole_folder
from supmer_ray.reading import build

if TYPE_CHECKING:
    from supmer_ray.fewshot.adapt import Progress
    from supmer_ray.model.backbone import Backbone

PREDICTED, PROBABILITY = "predicted_label", "probability"
"""The columns that `predict` adds."""

_PROMPT, RECORD = "prompt.safetensors", "adapted.json"


class AdaptedRecord(BaseModel):
    """What `adapted.json` says.

    Attributes:
        definition, pattern: the task, and which of its patterns was used.
        backbone: name by which the language model was loaded.
        backbone_fingerprint, tokenizer_fingerprint: what it must be when the prompt is used.
        regularized: whether a meta-learned ψ was applied to the gradients.
        prompt_sha256: of prompt.safetensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    definition: TaskDefinition
    pattern: int = Field(0, ge=0)
    backbone: str
    backbone_fingerprint: str
    tokenizer_fingerprint: str
    config: AdaptConfig
    seed: int
    regularized: bool
    best_step: int
    dev_accuracy: float
    test_accuracy: float | None = None
    prompt_sha256: str = ""

    @model_validator(mode="after")
    def _pattern_is_of_the_task(self) -> AdaptedRecord:
        if self.pattern >= (count := len(self.definition.patterns)):
            raise ValueError(f"pattern {self.pattern} is none of the task's {count}, which are counted from 0")
        return self


@dataclass(frozen=True, eq=False)
class Adapted:
    """A prompt (P, d) float32 with the record of how it came to be."""

    prompt: np.ndarray
    record: AdaptedRecord


def save_adapted(adapted: Adapted, folder: Path, *, overwrite: bool = False) -> None:
    """Write the folder in one piece.

    Raises:
        UserError: it holds something already and `overwrite` is false.
    """
    require_new_folder(folder, overwrite=overwrite, marker=RECORD)
    prompt = safetensors.numpy.save({"prompt": adapted.prompt})
    record = adapted.record.model_copy(update={"prompt_sha256": hashlib.sha256(prompt).hexdigest()})
    with whole_folder(folder) as partial:
        (partial / _PROMPT).write_bytes(prompt)
        (partial / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_adapted(folder: Path) -> Adapted:
    """Read the folder and check its digest.

    Raises:
        UserError: it is no adapted folder, or a file is missing, damaged or not to be read.
    """
    try:
        if not (folder / RECORD).is_file():
            raise UserError(f"{folder} holds no {RECORD}; name the folder that adapting a task wrote.")
        values = parse_record((folder / RECORD).read_text(encoding="utf-8"))
        record = build(AdaptedRecord, values, str(folder / RECORD))
        prompt = (folder / _PROMPT).read_bytes()
    except ValueError:
        raise UserError(f"{folder / RECORD} is damaged; adapt the task again.") from None
    except FileNotFoundError:
        raise UserError(f"{folder} lacks {_PROMPT}; adapt the task again.") from None
    except OSError as error:
        raise UserError(f"Cannot read {error.filename} ({error.strerror}); check its permissions.") from None
    if hashlib.sha256(prompt).hexdigest() != record.prompt_sha256:
        raise UserError(f"{folder / _PROMPT} is damaged (its digest is not the recorded one); adapt the task again.")
    try:
        rows = safetensors.numpy.load(prompt)["prompt"]
    except (SafetensorError, KeyError):
        rows = None
    if rows is None or rows.ndim != 2 or rows.dtype != np.float32:
        raise UserError(f"{folder / _PROMPT} holds no prompt; adapt the task again.")
    return Adapted(rows, record)


def require_backbone(adapted: Adapted, backbone: Backbone) -> None:
    """
    Raises:
        UserError: the prompt was adapted for another language model or tokenizer, or is not as wide as its rows.
    """
    record = adapted.record
    known = (record.backbone_fingerprint, record.tokenizer_fingerprint)
    if known != (backbone.fingerprint, backbone.tokenizer_fingerprint):
        raise UserError(
            f"The prompt for task '{record.definition.name}' was adapted for the backbone '{record.backbone}' and "
            f"'{backbone.name}' has other weights or another vocabulary; adapt the task again for this backbone."
        )
    if (width := adapted.prompt.shape[1]) != backbone.d_model:
        raise UserError(
            f"The prompt for task '{record.definition.name}' is {width} numbers wide and the backbone "
            f"'{record.backbone}' takes {backbone.d_model}; adapt the task again."
        )


def predict(
    adapted_folder: Path,
    input_file: Path,
    output_file: Path,
    *,
    overwrite: bool = False,
    backbone: Backbone | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Label the rows of a CSV, JSONL or Parquet file.

    Args:
        backbone: already loaded; unset: load the one that the folder names.

    Returns:
        What was written: the input's rows in their order, with the columns `predicted_label` and
        `probability` (of that label among the task's labels).

    Raises:
        UserError: the output exists, the input lacks a field or has no rows, the folder is damaged or
            belongs to another backbone. Nothing is written then.
    """
    require_path(output_file)
    require_ending(output_file)
    require_writable(output_file)
    if output_file.is_dir():
        raise UserError(f"The output {output_file} is a folder; name a file.")
    if output_file.exists() and not overwrite:
        raise UserError(f"The output {output_file} exists; choose another name, or add --overwrite to replace it.")
    if output_file.exists() and input_file.exists() and output_file.samefile(input_file):
        raise UserError(f"The output {output_file} is the input as well; name another file.")
    adapted = load_adapted(adapted_folder)
    record = adapted.record
    frame = read_table(input_file)
    require_columns(frame, record.definition.texts, str(input_file))
    for column in (PREDICTED, PROBABILITY):
        if column in frame.columns:
            raise UserError(f"{input_file} already has a column '{column}'; rename it, the prediction goes there.")
    # What the output's format has no place for is told before the work.
    with TemporaryDirectory(prefix="supmer-") as scratch:
        write_table(frame, Path(scratch) / output_file.name, shown=output_file)
    import torch

    from supmer_ray.fewshot.adapt import score
    from supmer_ray.fewshot.encoding import TaskEncoder, input_limit, label_probabilities
    from supmer_ray.model.backbone import best_device, load_backbone

    backbone = backbone or load_backbone(record.backbone, device=best_device())
    require_backbone(adapted, backbone)
    limit = input_limit(backbone, len(adapted.prompt), record.config.max_length)
    encoder = TaskEncoder(backbone, record.definition, max_length=limit, pattern=record.pattern)
    inputs, offered = encoder.inputs(frame), encoder.offered(frame)
    each = len(inputs) // len(frame)
    [scores] = score(
        backbone,
        torch.from_numpy(adapted.prompt)[None].to(backbone.device),
        [inputs],
        [encoder.verbalizer_ids],
        progress=progress and (lambda name, done, total: progress(name, done // each, total // each)),
    )
    probabilities, labels = label_probabilities(scores, offered), record.definition.labels
    frame[PREDICTED] = [labels[number] for number in probabilities.argmax(axis=1)]
    frame[PROBABILITY] = probabilities.max(axis=1).round(6)
    write_table(frame, output_file)
    return frame
