"""The prompt and regularizer that ship: from a finished meta-training run into the package.

A run on the embedded backbone and its store go in; a checkpoint without its optimizer comes out, with a card that
says what it learned from and how far it came:

    python -m supmer_ray.embedded.learned RUN STORE
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import yaml

from supmer_ray.data.store import read_manifest
from supmer_ray.embedded import LEARNED
from supmer_ray.errors import UserError
from supmer_ray.files import read_sealed, seal, whole_folder
from supmer_ray.meta.record import read_rows
from supmer_ray.meta.run import PROGRESS, PROMPT, REGULARIZER
from supmer_ray.train import CHECKPOINT

CARD = """# The meta-trained prompt and regularizer

θ ({rows} × {width}) and ψ_φ for the embedded backbone: what `supmer adapt` starts from on it. Learned from unlabeled
text alone: {documents:,} documents, {sentences:,} sentences of {sources}, train documents of the catalog, none of a
test split; {domains} domains in each family.

{steps:,} meta-steps, {minutes:.0f} minutes, by the commands of docs/results.md, with these settings (the rest are
defaults):

```yaml
{settings}```

Validation tasks, after the inner steps, before the first meta-step and after the last:

| task type | loss | | accuracy | |
|---|---|---|---|---|
{validation}

What it is worth on labelled tasks: docs/results.md.
"""


def ship(run: Path, store: Path, folder: Path = LEARNED) -> None:
    """Put a run's checkpoint, without its optimizer, and its card into `folder`.

    Raises:
        UserError: the run is not finished, has no checkpoint or no regularizer, or was not made from `store` on the
            embedded backbone. `folder` is as it was then.
    """
    checkpoint = run / CHECKPOINT
    description = read_sealed(checkpoint, "a checkpoint")
    manifest = read_manifest(store)
    if manifest.backbone.name != "embedded" or manifest.corpus != description["corpus"]:
        raise UserError(f"{run} was not meta-trained from {store} on the embedded backbone; name the store it read.")
    steps = read_rows(run, "step")
    planned = description["run"]["meta"]["steps"]
    if not steps or steps[-1]["step"] < planned:
        raise UserError(f"{run} has not come to its last step, {planned}; resume it first.")
    if not description["run"]["regularizer"]["enabled"]:
        raise UserError(f"{run} was meta-trained without a regularizer; what ships has one.")
    found = [row["validation"] for row in read_rows(run, "validation")]
    with whole_folder(folder) as partial:
        for file in (PROMPT, REGULARIZER, PROGRESS):
            shutil.copy(checkpoint / file, partial / file)
        description.pop("checksums")
        seal(partial, description)
        settings = {name: description["run"][name] for name in ("prompt", "tasks", "meta")}
        settings["workers"] = {"precision": description["run"]["workers"]["precision"]}
        card = CARD.format(
            rows=settings["prompt"]["length"],
            width=manifest.backbone.d_model,
            documents=manifest.documents,
            sentences=manifest.sentences,
            sources=", ".join(manifest.settings.sources),
            domains=manifest.settings.domains,
            steps=planned,
            minutes=sum(row["step_seconds"] + row["data_wait_seconds"] for row in steps) / 60,
            settings=yaml.safe_dump(settings, sort_keys=False),
            validation="\n".join(
                f"| {name} | {found[0][name]['loss']:.2f} | {last['loss']:.2f} "
                f"| {found[0][name]['accuracy']:.2f} | {last['accuracy']:.2f} |"
                for name, last in found[-1].items()
            ),
        )
        # Behind the seal: the card is for people and no part of the checkpoint.
        (partial / "CARD.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put a finished run's prompt and regularizer into the package.")
    parser.add_argument("run", type=Path, help="a run's folder, meta-trained on the embedded backbone")
    parser.add_argument("store", type=Path, help="the store that it read")
    given = parser.parse_args()
    try:
        ship(given.run, given.store)
    except UserError as error:
        sys.exit(str(error))
