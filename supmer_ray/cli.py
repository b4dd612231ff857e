"""The command line: parsing only. Each verb hands its work to one Python function.

Torch and Ray are imported inside the verbs, so that `supmer --help` answers at once.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os.path import isfile
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from supmer_ray import __version__, embedded
from supmer_ray.config import (
    AdaptConfig,
    PrepareConfig,
    load_evaluate_config,
    load_run_config,
    load_sweep_config,
    whole_name,
)
from supmer_ray.errors import Stopped, UserError, first_line, is_disk_full, require_new_folder
from supmer_ray.files import Place, require_new_place, require_outside, without_keys
from supmer_ray.meta.run import describe_checkpoint
from supmer_ray.reading import build, override

app = typer.Typer(
    help="Learn a universal soft prompt and a gradient regularizer from unlabeled text, on Ray (SUPMER).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MARKERS = {
    "prepare": "manifest.json",
    "train": "run.json",
    "tune": "sweep.json",
    "adapt": "adapted.json",
    "evaluate": "evaluation.json",
    "report": "index.html",
}
"""The file by which each verb knows its own output. Their modules name it, too, but take seconds to import."""

INTERRUPTED = 130
"""The exit status of what Ctrl-C or SIGTERM ended."""

PLAIN_ROWS = 10
"""Rows of a prompt that `adapt` starts from vocabulary rows."""

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output already holds.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
OutPlace = Annotated[str, typer.Option("--out", help="Folder to write, or the URI of one (s3://…).")]
InStore = Annotated[str, typer.Option("--store", help="What 'supmer prepare' wrote: a folder or its URI.")]


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"supmer-ray {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What stands before a verb; the app's own help describes it."""


@app.command()
def prepare(
    source: Annotated[
        list[str],
        typer.Option(
            help="Text: files, folders, s3://…, hub:NAME@CONFIG, a catalog name (txt, JSONL, Parquet, CSV); "
            "PATH::COLUMN names another column than 'text'; repeatable."
        ),
    ],
    out: OutPlace,
    backbone: Annotated[
        str | None, typer.Option(help="'embedded', a folder, or a hub name; unset: 'embedded'.")
    ] = None,
    domains: Annotated[int | None, typer.Option(help="Domains (clusters) of each data family; unset: 250.")] = None,
    max_documents: Annotated[int | None, typer.Option(help="Documents of each source at most.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of k-means and of the split into train and validation items; unset: 0.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting, for example sentence_length=64.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut text into sentences, embed them and cluster them into domains."""
    values = _given(
        {
            "--source": ("sources", tuple(source)),
            "--backbone": ("backbone", backbone),
            "--domains": ("domains", domains),
            "--max-documents": ("max_documents", max_documents),
            "--seed": ("seed", seed),
        },
        set_,
    )
    config = build(PrepareConfig, override(values, set_ or ()), "the command line")
    place = Place.of(out)
    require_new_place(place, overwrite=overwrite, marker=MARKERS["prepare"])
    from supmer_ray.console import stage
    from supmer_ray.data.prepare import prepare as build_store

    with stage("Reading text", "documents") as line:
        manifest = build_store(config, place, overwrite=overwrite, progress=line.named)
    print(f"{place}: {manifest.documents:,} documents, {manifest.sentences:,} sentences, {manifest.tokens:,} tokens")
    for name, family in manifest.families.items():
        print(f"  {name}: {family.items:,} items in {family.domains} domains")


@app.command()
def train(
    store: InStore,
    out: OutPlace,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file; unset: the paper's settings, for the embedded backbone what suits it."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example meta.steps=500; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Meta-train a soft prompt and a gradient regularizer on a prepared store."""
    require_new_place(Place.of(out), overwrite=overwrite, resume=resume, can_resume=True, marker=MARKERS["train"])
    _spare([config], out, overwrite)
    from supmer_ray.console import stage
    from supmer_ray.data.store import read_manifest
    from supmer_ray.train import CHECKPOINT
    from supmer_ray.train import train as run

    own = embedded.settings_for(read_manifest(store).backbone.name)
    run_config = load_run_config(config, set_ or (), own.get("run"))
    with stage("Meta-training", "steps") as line:
        progress = line.train_row(run_config.meta.steps)
        result = run(run_config, store, out, resume=resume, overwrite=overwrite, progress=progress)
    print(f"{result.out / CHECKPOINT}: the meta-trained prompt and regularizer (metrics.jsonl has one row a step)")


@app.command()
def tune(
    config: Annotated[Path, typer.Option(help="Search-space file, for example tune_configs/smoke.yaml.")],
    store: InStore,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted sweep.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Search inner rates, task mixtures and other settings of meta-training."""
    sweep = load_sweep_config(config)
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True, marker=MARKERS["tune"])
    _spare([config], out, overwrite)
    from supmer_ray.console import stage
    from supmer_ray.tune import tune as run

    with stage("Searching", "trials") as line:
        result = run(sweep, store, out, resume=resume, overwrite=overwrite, progress=line.trials_done)
    print(f"{result.file}: the best of {len(result.trials)} trials, objective {result.objective:.4f}")
    print(f"Next: supmer train --config {quote(str(result.file))} --store {quote(without_keys(store))} --out RUN")


@app.command()
def adapt(
    task: Annotated[str, typer.Option(help="A task's YAML file, or the name of a built-in task.")],
    out: Out,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="RUN/checkpoint or its URI; unset: with the embedded backbone the one that ships."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain prompt tuning instead: from vocabulary rows, raw gradients.")
    ] = False,
    backbone: Annotated[str | None, typer.Option(help="Unset: the checkpoint's, or 'embedded'.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="K, examples a class to train on, and as many for the dev split; unset: 16.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Unset: 200; on the embedded backbone what suits it.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Data seed: which K examples, and their order.")] = 0,
    pattern: Annotated[int, typer.Option(min=0, help="Which of the task's patterns, counted from 0.")] = 0,
    prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Rows of a prompt that starts from vocabulary rows; unset: 10.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Another setting, for example rate=0.05.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Adapt a prompt to a labelled task from K examples a class."""
    require_new_folder(out, overwrite=overwrite, marker=MARKERS["adapt"])
    _spare([task], out, overwrite)
    if overwrite and checkpoint:
        require_outside(Place.of(out), {"checkpoint": [Place.of(checkpoint)]})
    if plain and checkpoint:
        raise UserError("--plain starts from vocabulary rows and --checkpoint from a learned prompt; give one of them.")
    name = "embedded"
    if backbone:
        name = whole_name(backbone)
    elif checkpoint:
        name = describe_checkpoint(checkpoint).backbone
    if name == "embedded" and not plain:
        checkpoint = checkpoint or str(embedded.LEARNED)
    if checkpoint and prompt_length is not None:
        raise UserError(
            "--prompt-length is for a prompt that starts from vocabulary rows, and a learned one has its own; add "
            "--plain and leave --checkpoint out, or leave --prompt-length out."
        )
    values = embedded.settings_for(name).get("adapt", {})
    values |= _given({"--shots": ("shots", shots), "--steps": ("steps", steps)}, set_)
    config = build(AdaptConfig, override(values, set_ or ()), "the command line")
    from supmer_ray.fewshot.definition import TaskRows, load_definition
    from supmer_ray.fewshot.sampling import draw

    definition = load_definition(task)
    if pattern >= (count := len(definition.patterns)):
        raise UserError(f"Task '{definition.name}' has no pattern {pattern}; counted from 0, its last is {count - 1}.")
    rows = TaskRows.of(definition)
    draw(definition, rows.frames, config.shots, seed)  # that there are too few is told before torch is imported
    from supmer_ray.console import stage
    from supmer_ray.fewshot.evaluate import adapt_task
    from supmer_ray.meta.state import load_checkpoint
    from supmer_ray.model.backbone import best_device, load_backbone

    model = load_backbone(name, device=best_device())
    learned = load_checkpoint(checkpoint, model) if checkpoint else None
    shown = {"adapt": (f"Adapting to {definition.name}", "steps"), "test": ("Scoring the test split", "inputs")}
    with stage(*shown["adapt"]) as line:
        record = adapt_task(
            model,
            rows,
            learned,
            seed,
            config,
            out,
            pattern=pattern,
            prompt_length=prompt_length or PLAIN_ROWS,
            overwrite=overwrite,
            progress=lambda what, done, total: line.update(done, total, title=shown[what][0], unit=shown[what][1]),
        )
    print(
        f"{out}: {definition.name}, dev accuracy {record.dev_accuracy:.3f} (step {record.best_step}), "
        f"test accuracy {record.test_accuracy:.3f}"
    )


@app.command()
def evaluate(
    out: Out,
    suite: Annotated[str | None, typer.Option(help="open, domains, paper, or a YAML file.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead of a suite: names or YAML files, a,b,…")] = None,
    methods: Annotated[
        str, typer.Option(help="Names or YAML files, a,b,…")
    ] = "prompt-tuning,supmer,zero-shot,linear-probe",
    shots: Annotated[int | None, typer.Option(help="K, examples a class; short for --set adapt.shots.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Data seeds: draws of the K examples.")] = 5,
    curve: Annotated[
        str | None, typer.Option(help="shots, prompt-length, domains, corpus-size, meta-steps, or a YAML file.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="What 'supmer prepare' wrote, to meta-train on.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="METHOD=RUN/checkpoint, not to meta-train it; supmer=embedded is the one that ships."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmarks' published files.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with backbone, adapt, run, prepare, …; unset: on the embedded backbone what suits it."
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, for example adapt.rate=0.05.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare methods over tasks and data seeds; those that need meta-training get it first."""
    if (suite is None) == (tasks is None):
        raise UserError("Say what to compare on: either --suite NAME or --tasks a,b.")
    flags = _given({"--shots": ("adapt.shots", shots)}, set_)
    assignments = [*(set_ or ()), *(f"{key}={value}" for key, value in flags.items())]
    backbone = override({}, assignments).get("backbone", "embedded")
    settings = load_evaluate_config(config, assignments, embedded.settings_for(backbone))
    given = {}
    for pair in checkpoint or ():
        name, equals, folder = pair.partition("=")
        if not equals or not folder:
            raise UserError(
                f"--checkpoint {pair} names no method or no folder; write METHOD=FOLDER, as in supmer=RUN/checkpoint."
            )
        if name in given:
            raise UserError(f"--checkpoint names two for the method '{name}'; give one of them.")
        given[name] = Place.of(embedded.LEARNED if folder == "embedded" else folder)
    require_new_folder(out, overwrite=overwrite, resume=resume, can_resume=True, marker=MARKERS["evaluate"])
    _spare([config, suite, curve, *_names(methods)], out, overwrite)
    from supmer_ray.console import stage
    from supmer_ray.evaluate import evaluate as compare
    from supmer_ray.fewshot.method import load_method
    from supmer_ray.fewshot.plan import RESULTS, SUMMARY, TABLE, Plan
    from supmer_ray.fewshot.suite import Suite, load_curve, load_suite

    varied = load_curve(curve) if curve else None
    if varied and varied.key in [assignment.partition("=")[0].strip() for assignment in assignments]:
        raise UserError(f"The curve varies {varied.key}, which was given as well; leave one of the two out.")
    chosen = load_suite(suite) if suite else build(Suite, {"name": "tasks", "tasks": _names(tasks or "")}, "--tasks")
    plan = Plan(
        chosen,
        [load_method(name) for name in _names(methods)],
        settings,
        seeds,
        varied,
        Place.of(store) if store else None,
        given,
        data,
    )
    with stage("Reading tasks", "tasks") as line:
        rows = compare(plan, out, resume=resume, overwrite=overwrite, progress=line.named)
    print((out / TABLE).read_text(encoding="utf-8"))
    print(f"{out}: {len(rows)} rows in {RESULTS}, the tables above in {TABLE} and {SUMMARY}")


@app.command()
def predict(
    adapted: Annotated[Path, typer.Option(help="What 'supmer adapt' wrote.")],
    input: Annotated[Path, typer.Option(help="CSV, JSONL or Parquet with the task's text fields.")],
    output: Annotated[Path, typer.Option(help="CSV, JSONL or Parquet to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Label the rows of a file, in order, each with its probability."""
    from supmer_ray.console import stage
    from supmer_ray.fewshot.adapted import predict as predict_file

    with stage(f"Labelling {input}", "rows") as line:
        rows = predict_file(
            adapted, input, output, overwrite=overwrite, progress=lambda _, done, total: line.update(done, total)
        )
    print(f"{output}: {len(rows):,} rows with predicted_label and probability")


@app.command()
def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="RUN|EVAL...", help="What train and evaluate wrote; a run may be a URI.")
    ],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Draw runs and evaluations: one page for a browser, and its figures as PNG and SVG."""
    require_new_folder(out, overwrite=overwrite, marker=MARKERS["report"])
    from supmer_ray.report import report as draw

    page = draw(folders, out, overwrite=overwrite)
    print(f"{page}: open it in a browser; the same figures lie in {out / 'figures'}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/quickstart"),
    overwrite: Overwrite = False,
) -> None:
    """The whole way on real text, in ten minutes on two cores: prepare, meta-train, adapt, compare."""
    require_new_folder(out, overwrite=overwrite)
    from supmer_ray.quickstart import quickstart as run

    run(out, overwrite=overwrite)


@app.command()
def dashboard(
    out: Annotated[Path | None, typer.Option(help="Folder to write into; unset: where Ray's Grafana looks.")] = None,
) -> None:
    """Write the Grafana dashboard of meta-training, on the head node of a running cluster."""
    from supmer_ray.monitoring.dashboard import write_dashboard

    print(f"{write_dashboard(out)}: Grafana shows it as 'SUPMER meta-training'")


@app.command()
def doctor(
    golden: Annotated[
        Path | None, typer.Option(help="Replay the meta-step on this .safetensors file (its .json beside it).")
    ] = None,
) -> None:
    """Say what this machine and cluster have and what a run would use, or replay a golden file."""
    from supmer_ray import doctor as examine

    if golden:
        raise typer.Exit(examine.replay(golden))
    examine.describe()


def _given(flags: Mapping[str, tuple[str, Any]], assignments: Sequence[str] | None) -> dict[str, Any]:
    """The settings that the flags give.

    Args:
        flags: flag → the key that it is short for, and its value or None.
        assignments: what --set says.

    Raises:
        UserError: a setting is given by its flag and by --set.
    """
    keys = [assignment.partition("=")[0].strip() for assignment in assignments or ()]
    for flag, (key, value) in flags.items():
        if value is not None and key in keys:
            raise UserError(f"{flag} and --set {key}=… give the same setting; keep one of the two.")
    return {key: value for key, value in flags.values() if value is not None}


def _spare(given: Sequence[Path | str | None], out: Path | str, overwrite: bool) -> None:
    """Refuse to replace an output that holds a file of settings which the command was given.

    Raises:
        UserError: one of those of `given` that are files lies within `out`.
    """
    if overwrite:
        require_outside(Place.of(out), {"file": [Place.of(file) for file in given if file and isfile(file)]})


def _require_values(arguments: Sequence[str]) -> None:
    """
    Raises:
        UserError: an argument is empty, as an unset variable of the shell leaves it; as a path it would be the folder
            that one is in.
    """
    for number, argument in enumerate(arguments):
        before = arguments[number - 1] if number else ""
        option = re.fullmatch(r"(--[a-z-]+)=\s*", argument)
        if option or not argument.strip():
            name = option[1] if option else before if before.startswith("--") else "An argument"
            raise UserError(f"{name} is empty; write a value (is a variable of the shell unset?), or leave it out.")


def _require_lasting(arguments: Sequence[str]) -> None:
    """
    Raises:
        UserError: a job's output is a relative path: it would lie in the copy of the working directory that Ray has
            made for the job, which other nodes do not see and Ray deletes.
    """
    if "working_dir_files" not in Path.cwd().parts:
        return
    for before, argument in pairwise(["", *arguments]):
        option = re.fullmatch(r"(--out|--output)=(.*)", argument)
        given = option[2] if option else argument if before in ("--out", "--output") else None
        if given and "://" not in given and not Path(given).is_absolute():
            raise UserError(
                f"The output {given} is a relative path, and a job runs in a copy of its folder that Ray deletes; "
                "write an absolute path that every node sees."
            )


def _names(listed: str) -> list[str]:
    """The parts of "a,b,c"."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `supmer` command and of `jobs/`: a user's mistake is one sentence and exit status 2.

    Args:
        arguments: a verb and its options; unset: those of the process.
    """
    try:
        given = sys.argv[1:] if arguments is None else arguments
        _require_values(given)
        _require_lasting(given)
        app(arguments)
    except UserError as error:
        print(f"supmer: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"supmer: {stop}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code in (INTERRUPTED, signal.SIGTERM):  # what Typer makes of Ctrl-C, and Ray of SIGTERM
            print("supmer: stopped.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        print(
            f"supmer: No room is left where the command writes ({first_line(error)}); make some and give it again, "
            "with --resume where it has that and had begun.",
            file=sys.stderr,
        )
        sys.exit(2)
