"""A report of runs and evaluations: folders go in, one self-contained HTML page and its figures come out.

The page asks for nothing from outside, fits a phone and follows the reader's light or dark setting. The
same figures stand beside it as PNG and SVG.

    OUT/index.html      the page
    OUT/figures/        NAME.png and NAME.svg of every figure
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from supmer_ray import figures
from supmer_ray.config import RunConfig
from supmer_ray.console import duration
from supmer_ray.data.store import Store
from supmer_ray.errors import UserError, require_new_folder
from supmer_ray.fewshot.comparison import INTERVAL_IS, gaps, pair_name, probability, summarize
from supmer_ray.fewshot.plan import DESCRIPTION, RESULTS
from supmer_ray.files import Place, Where, parse_record, require_outside, whole_folder
from supmer_ray.meta.record import METRICS_FILE, read_rows
from supmer_ray.meta.run import CONFIG_FILE
from supmer_ray.reading import build

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, FIGURES = "index.html", "figures"

_ASKS = {
    "nsp": "are these two sentences neighbours?",
    "nss": "which candidate follows these two sentences?",
    "scsp": "do these two sentences share a domain?",
    "scss": "which candidate shares the first sentence's domain?",
    "scc": "which of four centroids is this sentence's domain?",
    "sck": "which word of four domains fits this sentence?",
}
"""What a task of each type asks, for those who do not know its name."""

EXAMPLES = 12
"""Domains that the page shows sentences of."""


class _Row(BaseModel):
    """What the page needs of a row; there may be more in it."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Step(_Row):
    """A step in a run's metrics; its figures are not finite where a gradient was not."""

    step: int
    task_type: str
    step_seconds: FiniteFloat
    data_wait_seconds: FiniteFloat
    tokens: int
    query_loss: float
    similarity: float
    running_similarity: float | None  # until a gradient was finite
    mixing: float
    gate: float
    update_cosine: float


class _Found(_Row):
    """What a validation found for a task type."""

    loss: float
    accuracy: float


class _Validation(_Row):
    """A validation in a run's metrics."""

    step: int
    validation: dict[str, _Found]


class _Result(_Row):
    """A row of an evaluation's results."""

    point: str
    method: str
    train: str
    test: str
    seed: int
    shots: int
    test_accuracy: float
    seconds: float
    trained_parameters: int


_AnyRow = TypeVar("_AnyRow", bound=_Row)


@dataclass
class _Section:
    """A part of the page about one folder.

    Attributes:
        prefix: of its figures' names, which those of other sections do not have.
        blocks: pieces of HTML, in order.
        drawn: (name, figure) of every figure.
    """

    title: str
    prefix: str
    blocks: list[str] = field(default_factory=list)
    drawn: list[tuple[str, Figure]] = field(default_factory=list)

    def draw(self, name: str, figure: Figure, caption: str) -> None:
        """Add a figure to the page, and note it for the files beside the page."""
        name = self.prefix + name
        self.drawn.append((name, figure))
        text = io.StringIO()
        with figures.style(name):
            figure.savefig(text, format="svg")
        drawing = _inline(text.getvalue(), name, caption)
        self.blocks.append(f'<figure id="{name}">{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>')

    def fold(self, settings: Mapping[str, Any]) -> None:
        """Add the settings, folded up."""
        text = html.escape(json.dumps(settings, indent=1, ensure_ascii=False))
        self.blocks.append(f"<details><summary>Configuration</summary><pre>{text}</pre></details>")


def report(folders: Sequence[Where], out: Path, *, overwrite: bool = False) -> Path:
    """Write the report of runs and evaluations, folders or the URIs of runs, into the folder `out`.

    Returns:
        The page.

    Raises:
        UserError: a folder is neither a run nor an evaluation, or has nothing to show yet.
    """
    require_new_folder(out, overwrite=overwrite, marker=PAGE)
    if not folders:
        raise UserError("Name at least one run or evaluation to report on.")
    if overwrite:
        require_outside(Place.of(out), {"run or evaluation": [Place.of(folder) for folder in folders]})
    sections = []
    for number, folder in enumerate(folders):
        prefix = f"{number + 1}-" if len(folders) > 1 else ""
        place = Place.of(folder)
        with place.answering():
            is_run = place.holds(METRICS_FILE) and place.holds(CONFIG_FILE)
        if is_run:
            sections.append(_run(place, prefix))
        elif not place.remote and place.holds(DESCRIPTION):
            sections.append(_evaluation(place.local, prefix))
        else:
            raise UserError(
                f"{place} is neither a run ({CONFIG_FILE}, {METRICS_FILE}) nor an evaluation ({DESCRIPTION}); name a "
                "folder that 'supmer train' or 'supmer evaluate' wrote."
            )
    with whole_folder(out) as partial:
        (partial / FIGURES).mkdir()
        for section in sections:
            for name, figure in section.drawn:
                with figures.style(name):
                    for ending in ("png", "svg"):
                        figure.savefig(partial / FIGURES / f"{name}.{ending}", dpi=200)
        (partial / PAGE).write_text(_page(sections), encoding="utf-8")
    return out / PAGE


def _unlike(file: Place | Path) -> UserError:
    """What to say of a file that is not as its command writes it: of earlier days, cut short or mixed up."""
    return UserError(f"{file} was written by another version, or is damaged; leave its folder out.")


def _record(place: Place, name: str) -> dict[str, Any]:
    """How a run or an evaluation was started.

    Raises:
        UserError: the file is not to be read, or is no JSON object.
    """
    try:
        with place.answering():
            return parse_record(place.read(name) or "")
    except ValueError:
        raise _unlike(place / name) from None


def _metrics(place: Place, kind: str, schema: type[_AnyRow]) -> list[_AnyRow]:
    """The rows of a kind of a run.

    Raises:
        UserError: one of them lacks what the page needs.
    """
    try:
        return [schema.model_validate(row) for row in read_rows(place, kind)]
    except (ValidationError, KeyError, TypeError):
        raise _unlike(place / METRICS_FILE) from None


def _run(place: Place, prefix: str) -> _Section:
    """The section of a meta-training run."""
    steps = pd.DataFrame(map(dict, _metrics(place, "step", _Step)))
    if steps.empty:
        raise UserError(f"The run in {place} has no step to show yet; wait for its first one.")
    steps["running_similarity"] = steps["running_similarity"].astype(float)
    validated = _metrics(place, "validation", _Validation)
    if len({frozenset(row.validation) for row in validated}) > 1:
        raise _unlike(place / METRICS_FILE)  # each validation is on the tasks of the first
    validations = pd.DataFrame(
        [
            {"step": row.step, "task_type": name, **dict(found)}
            for row in validated
            for name, found in row.validation.items()
        ],
        columns=["step", "task_type", "loss", "accuracy"],
    )
    seconds = float(steps["step_seconds"].sum() + steps["data_wait_seconds"].sum())
    settings = _record(place, CONFIG_FILE)
    match settings:
        case {"config": dict(values), "store": str(store)}:
            config = build(RunConfig, values, str(place / CONFIG_FILE))
        case _:
            raise _unlike(place / CONFIG_FILE)
    section = _Section(f"Run {place.name}", prefix)
    section.blocks.append(
        _facts(
            {
                "meta-steps": f"{len(steps):,} of {config.meta.steps:,}",
                "tasks a step": str(config.tasks.tasks_per_step),
                "prompt rows": str(config.prompt.length),
                "time in steps": duration(seconds),
                "waited for data": f"{100 * steps['data_wait_seconds'].sum() / max(seconds, 1e-9):.1f} %",
                "tokens": f"{steps['tokens'].sum():,}",
            }
        )
    )

    with figures.style(prefix):
        section.draw(
            "losses",
            figures.losses(steps, validations),
            "Query loss by task type: lines are the training tasks (running mean), dots the fixed validation tasks "
            "after the inner step. "
            + " ".join(f"{name}: {asks}" for name, asks in _ASKS.items() if name in set(steps["task_type"])),
        )
        section.draw(
            "signals",
            figures.signals(steps),
            "The curriculum and the gate: s, the running agreement of query and support gradients; λ, the share that a "
            "task keeps of its own domain when it is mixed; z, how much of the raw gradient the regularizer "
            "ψ keeps. Lines of λ and z: running means; dots: single steps.",
        )
        section.draw(
            "alignment",
            figures.alignment(steps),
            "Gradient alignment: how far the regularized gradient ψ points the way of the query gradient, and of the "
            "raw support gradient; 1: the same way, 0: at right angles. Lines: running means; dots: single steps.",
        )
        try:
            opened = Store.open(store)
            # Runs of earlier versions have no digest.
            if settings.get("store_digest", opened.manifest.digest) != opened.manifest.digest:
                raise UserError(f"The store {store} was made anew since the run was started.")
        except UserError as error:
            section.blocks.append(f"<p>The domains are not drawn. {html.escape(str(error))}</p>")
        else:
            marked = figures.spread_domains(opened, EXAMPLES)
            section.draw(
                "domains",
                figures.domain_plane(opened, marked),
                "Domains of single sentences on a plane, each as large as its number of sentences; sentences of the "
                "numbered ones below.",
            )
            section.blocks.append(_domain_table(opened, marked))
    if not validations.empty:
        section.blocks.append(_validation_table(validations))
    section.fold(settings)
    return section


def _evaluation(folder: Path, prefix: str) -> _Section:
    """The section of an evaluation."""
    if not (folder / RESULTS).is_file():
        raise UserError(f"The evaluation in {folder} has no {RESULTS} yet; finish it with 'supmer evaluate --resume'.")
    with Place.of(folder).answering():
        rows = _results(folder / RESULTS)
    described = _record(Place.of(folder), DESCRIPTION)
    match described:
        case {
            "config": {"baseline": str(baseline), "backbone": str(backbone)},
            "suite": {"name": str(suite)},
            "seeds": int(seeds),
            "curve": (None | {"key": str(), "values": list(), "description": str()}) as curve,
        }:
            pass
        case _:
            raise _unlike(folder / DESCRIPTION)
    if curve and len(curve["values"]) != rows["point"].nunique():
        raise _unlike(folder / RESULTS)
    section = _Section(f"Evaluation {folder.name}", prefix)
    section.blocks.append(
        _facts(
            {
                "suite": suite,
                "tasks": str(rows["train"].nunique()),
                "methods": str(rows["method"].nunique()),
                "data seeds": str(seeds),
                "examples a class (K)": ", ".join(map(str, sorted(rows["shots"].unique()))),
                "backbone": Path(backbone).name,
            }
        )
    )

    table, drops = summarize(rows, baseline), gaps(rows, baseline)
    at = f" At {rows['point'].iloc[-1]}." if curve else ""
    with figures.style(prefix):
        if baseline in set(rows["method"]) and rows["method"].nunique() > 1:
            section.draw(
                "differences",
                figures.differences(table, baseline),
                f"Mean difference to {baseline} on the same draws, with its interval over seeds ({INTERVAL_IS}).{at}",
            )
        if curve:
            caption = (
                f"{curve['description']} Mean over the tasks, whiskers: standard deviation of that mean over seeds."
            )
            section.draw("curves", figures.curves(rows, curve["key"], curve["values"]), caption)
        section.draw(
            "accuracies",
            figures.accuracies(rows),
            f"Test accuracy of every method on every task, mean and standard deviation over seeds.{at}",
        )
        if not drops.empty:
            section.draw(
                "domain-gaps",
                figures.domain_gaps(drops),
                f"Accuracy on the domain that was adapted on, and on others.{at}",
            )
    section.blocks.append(_results_table(table, baseline))
    section.fold(described)
    return section


def _results(file: Path) -> pd.DataFrame:
    """The rows of an evaluation's results.

    Raises:
        UserError: there is none, one lacks what the page needs, or one is there twice.
    """
    try:
        found = [_Result.model_validate(row) for row in pd.read_parquet(file).to_dict("records")]
    except (ValueError, pyarrow.ArrowException):  # a ValidationError is a ValueError
        raise _unlike(file) from None
    rows = pd.DataFrame(map(dict, found))
    if rows.empty or rows.duplicated(["point", "method", "train", "test", "seed"]).any():
        raise _unlike(file)
    return rows


def _inline(svg: str, name: str, label: str) -> str:
    """An SVG file's text as an element of a page: names of its own, the page's colours, as wide as there is room."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}--', svg)
    svg = re.sub(r"url\(#", f"url(#{name}--", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}--', svg)
    svg = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*" ([^>]*?)(?:width|height)="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    names = {figures.INK: "ink", figures.GRID: "grid", figures.PAPER: "paper"}
    names |= {colour: f"series-{number}" for number, colour in enumerate(figures.SERIES)}
    for colour, variable in names.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label, quote=True)}" ', 1)


def _facts(facts: dict[str, str]) -> str:
    pairs = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _validation_table(validations: pd.DataFrame) -> str:
    first, last = validations["step"].min(), validations["step"].max()
    lines = []
    for name, own in validations.groupby("task_type"):
        before, after = (own[own["step"] == step].iloc[0] for step in (first, last))
        losses = f"{before['loss']:.3f} → {after['loss']:.3f}"
        lines.append(
            [str(name), losses, f"{100 * before['accuracy']:.0f}{_GAP}→{_GAP}{100 * after['accuracy']:.0f}{_GAP}%"]
        )
    head = ["task type", f"validation loss, step {first} → {last}", "accuracy"]
    return _html_table(head, lines)


def _domain_table(store: Store, marked: Sequence[int]) -> str:
    family = store.family("ss")
    lines = []
    for number in marked:
        items = family.rows(number, "train")
        sentences = sorted((store.text(int(row)) for row in items[:: max(1, len(items) // 40)]), key=len)
        # Around the median length: neither fragments nor the longest sentences.
        middle = sentences[len(sentences) // 2 : len(sentences) // 2 + 2]
        lines.append([str(number), str(int(np.diff(family.starts)[number])), " | ".join(middle)])
    return _html_table(["domain", "sentences", "for example"], lines)


def _results_table(table: pd.DataFrame, baseline: str) -> str:
    compared = table["difference"].notna().any()
    head = ["task", "method", "accuracy, %"]
    head += [f"points above {baseline}", "95 % interval", "p"] if compared else []
    head += ["seconds a seed", "trained parameters"]
    says = "Mean and standard deviation over data seeds."
    if compared:
        says += f" Difference to {baseline} on the same draws, its interval ({INTERVAL_IS}), p of the paired t-test."
    parts = [f"<p>{html.escape(says)}</p>"]
    for point in dict.fromkeys(table["point"]):
        lines = []
        for _, one in table[table["point"] == point].iterrows():
            task = pair_name(one["train"], one["test"])
            spread = "" if np.isnan(one["sd"]) else f"{_GAP}±{_GAP}{one['sd']:.1f}"
            difference = "" if np.isnan(one["difference"]) else f"{one['difference']:+.1f}"
            interval, p = "", ""
            if not np.isnan(one["p"]):
                interval = f"{one['low']:+.1f}{_GAP}to{_GAP}{one['high']:+.1f}"
                p = probability(one["p"]).removeprefix("= ")
            cost = [f"{one['seconds']:.1f}", f"{one['trained_parameters']:,.0f}"]
            against = [difference, interval, p] if compared else []
            lines.append([task, one["method"], f"{one['mean']:.1f}{spread}", *against, *cost])
        parts.append((f"<h3>{html.escape(point)}</h3>" if point else "") + _html_table(head, lines))
    return "".join(parts)


def _html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    # A phone scrolls a wide table within its own box, which a keyboard has to reach as well.
    box = f'<div class="table" tabindex="0" role="region" aria-label="{html.escape(", ".join(head), quote=True)}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


_GAP = "\N{NO-BREAK SPACE}"

_DARK = ("#6ea0ff", "#ff8a55", "#3fcf9a", "#cd85ea", "#e0b13c", "#ff76a4", "#8ccb48", "#a3aab8")
"""The series' colours on a dark page."""


def _page(sections: Sequence[_Section]) -> str:
    light = "".join(f"--series-{number}:{colour};" for number, colour in enumerate(figures.SERIES))
    dark = "".join(f"--series-{number}:{colour};" for number, colour in enumerate(_DARK))
    style = f"""
:root {{ color-scheme: light dark; --ink:{figures.INK}; --grid:{figures.GRID}; --paper:{figures.PAPER}; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink:#e6e7ec; --grid:#3a3d48; --paper:#16171c; {dark} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.25rem; margin: 2rem 0 .5rem; }} h3 {{ font-size: 1rem; }}
.blocks {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem; }}
.blocks > :not(figure) {{ grid-column: 1 / -1; margin: 0; min-width: 0; }}
figure {{ margin: 0; min-width: 0; }} figure svg {{ display: block; width: 100%; height: auto; }}
figure svg text {{ font-family: system-ui, sans-serif !important; }}
figcaption {{ font-size: .85rem; opacity: .85; }}
.facts {{ display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; }} .facts dt {{ font-size: .8rem; opacity: .75; }}
.facts dd {{ margin: 0; font-weight: 600; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }}
td {{ font-variant-numeric: tabular-nums; }} pre {{ overflow-x: auto; font-size: .75rem; }}
"""
    title = ", ".join([*(section.title for section in sections), "supmer report"])
    body = "".join(
        f'<section><h2>{html.escape(section.title)}</h2><div class="blocks">{"".join(section.blocks)}</div></section>'
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>'
        f"{html.escape(title)}</title><style>{style}</style></head><body><h1>supmer report</h1>{body}</body></html>\n"
    )
