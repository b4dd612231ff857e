"""The command line: fast help, and every mistake one sentence with exit status 2 and nothing written."""

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from supmer_ray.cli import MARKERS, main
from supmer_ray.config import PAPER_TASK_TYPES, TASK_TYPES
from supmer_ray.data.store import MANIFEST
from supmer_ray.errors import UserError
from supmer_ray.fewshot.adapted import RECORD
from supmer_ray.fewshot.plan import DESCRIPTION
from supmer_ray.meta.run import CONFIG_FILE
from supmer_ray.report import PAGE
from supmer_ray.tune import SWEEP_FILE

SMOKE = Path(__file__).parents[2] / "tune_configs" / "smoke.yaml"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "meta_step.safetensors"


def started(*arguments):
    """What the command answers as a process of its own."""
    command = [sys.executable, "-c", "from supmer_ray.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def supmer(*arguments):
    """What the command answers in this process, which has what another would import for seconds."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, ended.value.code, output.getvalue(), errors.getvalue())


def sentence(done):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("supmer: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def refused(*arguments):
    return sentence(supmer(*arguments))


def test_its_version_is_the_package_s():
    done = supmer("--version")
    assert (done.returncode, done.stdout) == (0, f"supmer-ray {version('supmer-ray')}\n")


def test_help_answers_at_once_and_imports_nothing_heavy():
    probe = (
        "import sys, supmer_ray.cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers', 'datasets', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
    # Processor time, not wall time: what else the machine does must not decide.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "prepare" in started("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 2  # half a second on two slow cores, and more than two with torch alone


MISTAKEN = """
import sys
import supmer_ray.report
from supmer_ray.cli import main

for mistake in (
    "evaluate --suite opne --out",
    "evaluate --suite open --methods suprem --out",
    "evaluate --tasks bbc-topics --out",
    "adapt --task sst-3 --out",
    "adapt --task bbc-topic --set rat=3 --out",
    "adapt --task bbc-topic --shots 5000 --out",
    "predict --adapted nope --input x.csv --output y.csv --overwrite --adapted",
):
    try:
        main([*mistake.split(), sys.argv[1]])
    except SystemExit as end:
        assert end.code == 2
print([name for name in ("torch", "ray", "transformers", "sklearn", "scipy") if name in sys.modules])
"""


def test_a_report_and_a_mistake_need_nothing_heavy(tmp_path):
    done = subprocess.run([sys.executable, "-c", MISTAKEN, tmp_path / "out"], capture_output=True, text=True)
    told = done.stderr.splitlines()
    for line, end in zip(
        told,
        [
            "name a YAML file or a built-in suite: did you mean 'open'?",
            "name a YAML file or a built-in method: did you mean 'supmer'?",
            "name a YAML file or a built-in task: did you mean 'bbc-topic'?",
            "name a YAML file or a built-in task: did you mean 'sst-5'?",
            "did you mean 'rate'?",
            "lower the shots or add rows.",
            "name the folder that adapting a task wrote.",
        ],
        strict=True,
    ):
        assert line.endswith(end), done.stderr
    assert done.stdout == "[]\n"


def test_configuration_mistakes(tmp_path):
    out = tmp_path / "out"
    plain = ("evaluate", "--tasks", "bbc-topic", "--out", out)
    assert "'run.meta.stpes' in the command line; did you mean 'steps'" in refused(*plain, "--set", "run.meta.stpes=1")
    assert "Cannot read" in refused(*plain, "--config", tmp_path / "no.yaml")
    assert "has no manifest.json" in refused("train", "--store", tmp_path, "--out", out)
    assert "domains" in refused("prepare", "--source", "bbc", "--out", out, "--domains", "1")
    assert "shots" in refused("adapt", "--task", "bbc-topic", "--out", out, "--shots", "0")
    assert "steps" in refused("adapt", "--task", "bbc-topic", "--out", out, "--steps", "0")
    message = refused("adapt", "--task", "rte", "--out", out, "--pattern", "9")
    assert message == "supmer: Task 'rte' has no pattern 9; counted from 0, its last is 8.\n"
    both = ("--plain", "--checkpoint", tmp_path)
    assert "give one of them" in refused("adapt", "--task", "bbc-topic", "--out", out, *both)
    assert not out.exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("precious")
    foreign = r"The output .* holds something else than this command writes \({} is missing\); name another\.$"
    commands = {
        "prepare": ["--source", "bbc"],
        "train": ["--store", tmp_path],
        "tune": ["--store", tmp_path, "--config", SMOKE],
        "adapt": ["--task", "bbc-topic"],
        "evaluate": ["--tasks", "bbc-topic"],
        "report": [tmp_path],
    }
    for verb, arguments in commands.items():
        assert re.search(foreign.format(MARKERS[verb]), refused(verb, *arguments, "--out", tmp_path))
    assert "is not empty; choose another, or add --overwrite" in refused("quickstart", "--out", tmp_path)
    run = tmp_path.with_name("run")
    run.mkdir()
    (run / MARKERS["train"]).write_text("{}")
    message = refused("train", "--store", tmp_path, "--out", run)
    assert "already holds a run" in message and "--overwrite" in message and "--resume" in message
    # Not even --overwrite replaces what another command, or a person, has written.
    message = refused("report", tmp_path, "--out", tmp_path, "--overwrite")
    assert "(index.html is missing), so it is not overwritten; name another" in message
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_overwriting_spares_the_files_of_settings(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    for verb, arguments in {
        "train": ["--store", tmp_path, "--config", own],
        "tune": ["--store", tmp_path, "--config", SMOKE],
        "adapt": ["--task", own],
        "adapt --checkpoint": ["--task", "bbc-topic", "--checkpoint", own],
        "evaluate --suite": ["--suite", own],
        "evaluate --curve": ["--suite", "open", "--curve", own],
        "evaluate --methods": ["--suite", "open", "--methods", f"supmer,{own}"],
        "evaluate --config": ["--suite", "open", "--config", own],
    }.items():
        verb = verb.partition(" ")[0]
        (tmp_path / MARKERS[verb]).write_text("{}")
        if verb == "tune":  # whose file must be a whole search space
            given = tmp_path / "space.yaml"
            shutil.copy(arguments[-1], given)
            arguments = [*arguments[:-1], given]
        message = refused(verb, *arguments, "--out", tmp_path, "--overwrite")
        assert re.search(
            r"The (file|checkpoint) .*\.yaml lies within the output .*, which --overwrite would delete", message
        ), message
    assert own.is_file() and given.is_file()


def test_the_verbs_know_their_outputs_by_what_their_modules_write():
    assert MARKERS == {
        "prepare": MANIFEST,
        "train": CONFIG_FILE,
        "tune": SWEEP_FILE,
        "adapt": RECORD,
        "evaluate": DESCRIPTION,
        "report": PAGE,
    }


def test_an_evaluation_says_what_it_compares(tmp_path):
    out = tmp_path / "out"
    assert "either --suite NAME or --tasks a,b" in refused("evaluate", "--out", out)
    assert "either --suite NAME" in refused("evaluate", "--out", out, "--suite", "open", "--tasks", "bbc-topic")
    assert "did you mean 'rate'" in refused("evaluate", "--out", out, "--suite", "open", "--set", "adapt.rat=0.1")
    message = refused("evaluate", "--out", out, "--suite", "open", "--checkpoint", "runs/first/checkpoint")
    assert "write METHOD=FOLDER" in message
    shipped = ("--tasks", "bbc-topic", "--methods", "supmer", "--checkpoint", "supmer=embedded")
    message = refused("evaluate", "--out", out, *shipped, "--set", "run.prompt.length=5")
    assert "embedded/learned holds a prompt of 10 rows" in message
    twice = tmp_path / "twice.yaml"
    twice.write_text("{name: zero shot, learns: nothing}")
    message = refused("evaluate", "--out", out, "--tasks", "bbc-topic", "--methods", f"zero-shot,{twice}")
    assert "Two methods of the comparison have the name 'zero-shot'" in message
    twice.write_text("{name: deep, learns: prompt, meta: {prompt.length.x: 1}}")
    message = refused("evaluate", "--out", out, "--tasks", "bbc-topic", "--methods", twice)
    assert "'prompt.length.x' goes below 'length', which is no section" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("assignments", "mixture"),
    [
        (["backbone=some/name"], dict.fromkeys(PAPER_TASK_TYPES, 1.0)),
        (["backbone=some/name", "run.tasks.mixture.sck=1"], dict.fromkeys(TASK_TYPES, 1.0)),
        ([], {"nsp": 1.0, "scsp": 1.0}),
        (["run.tasks.mixture.sck=1"], {"nsp": 1.0, "scsp": 1.0, "sck": 1.0}),
    ],
)
def test_a_comparison_starts_from_what_suits_its_backbone(tmp_path, monkeypatch, assignments, mixture):
    def told(plan, out, **_):
        raise UserError(str(plan.config.run.tasks.mixture))

    monkeypatch.setattr("supmer_ray.evaluate.evaluate", told)
    settings = [part for one in assignments for part in ("--set", one)]
    assert str(mixture) in refused("evaluate", "--tasks", "bbc-topic", "--out", tmp_path / "out", *settings)


def test_a_setting_is_given_once(tmp_path):
    out = ("--out", tmp_path / "out")
    twice = r"{} and --set {}=… give the same setting; keep one of the two\."
    tasks = ("evaluate", "--tasks", "bbc-topic", *out)
    for command, flag, key in (
        (("adapt", "--task", "bbc-topic", *out), "--shots", "shots"),
        (("adapt", "--task", "bbc-topic", *out), "--steps", "steps"),
        (("prepare", "--source", "bbc", *out), "--domains", "domains"),
        (tasks, "--shots", "adapt.shots"),
    ):
        assert re.search(twice.format(flag, key), refused(*command, flag, 8, "--set", f"{key}=4"))
    checkpoints = ("--checkpoint", "supmer=A", "--checkpoint", "supmer=B")
    assert "--checkpoint names two for the method 'supmer'; give one" in refused(*tasks, *checkpoints)
    assert "write METHOD=FOLDER" in refused(*tasks, "--checkpoint", "supmer=")
    for given in (("--shots", 4), ("--set", "adapt.shots = 4")):
        message = refused(*tasks, "--curve", "shots", *given)
        assert "The curve varies adapt.shots, which was given as well; leave one of the two out." in message
    message = refused(*tasks, "--data", tmp_path / "nowhere")
    assert re.search(
        r"There is no folder .*nowhere that may be read; name the one with the benchmarks' published files\.", message
    )


def test_a_learned_prompt_has_its_own_length(tmp_path):
    message = refused("adapt", "--task", "bbc-topic", "--out", tmp_path / "out", "--prompt-length", 20)
    assert "a learned one has its own; add --plain" in message


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("adapt", "--task", "bbc-topic", "--out", "{}", "--checkpoint", ""), "--checkpoint"),
        (("adapt", "--task", "bbc-topic", "--out", "{}", "--backbone="), "--backbone"),
        (("prepare", "--source", " ", "--out", "{}"), "--source"),
        (("train", "--store", "", "--out", "{}"), "--store"),
        (("evaluate", "--suite", "", "--out", "{}"), "--suite"),
        (("report", "", "--out", "{}"), "An argument"),
    ],
)
def test_an_empty_value_is_none(tmp_path, command, named):
    message = refused(*(part.format(tmp_path / "out") for part in command))
    assert message.startswith(f"supmer: {named} is empty; write a value (is a variable of the shell unset?)")


def test_a_jobs_output_is_a_whole_path(tmp_path, monkeypatch):
    """Ray runs a job in a copy of its folder, and deletes it."""
    folder = tmp_path / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for given in (["--out", "runs/store"], ["--out=runs/store"]):
        message = refused("prepare", "--source", "bbc", *given)
        assert "The output runs/store is a relative path" in message and "an absolute path that every node" in message
    assert not any(folder.iterdir())
    assert "There is no file, folder" in refused("prepare", "--source", "no-such", "--out", tmp_path / "store")


def test_what_the_system_refuses_to_look_at_is_one_sentence(tmp_path):
    """A name longer than 255 bytes; in folders that may not be entered the answers are the same, but not root's."""
    long = ";".join(["bbc-topic"] * 40)
    assert f"There is no task '{long}'" in refused("adapt", "--task", long, "--out", tmp_path / "out")
    message = refused("adapt", "--task", "bbc-topic", "--backbone", long, "--out", tmp_path / "out")
    assert "Cannot load the backbone" in message
    assert "There is no folder" in refused("evaluate", "--suite", "paper", "--data", long, "--out", tmp_path / "out")
    assert "golden" in refused("doctor", "--golden", long)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ({"format": 9, "checksums": {}}, "has checkpoint format 9; this version reads 1."),
        ({"format": 1, "checksums": {}, "backbone": "embedded"}, "config.json is damaged; use another copy of it."),
        ({"format": 1, "checksums": {}, "backbone": {}, "run": {}}, "config.json is damaged; use another copy of it."),
    ],
)
def test_a_checkpoint_of_another_shape_is_one_sentence(tmp_path, description, sentence):
    (tmp_path / "config.json").write_text(json.dumps(description))
    out = ("--out", tmp_path / "out")
    assert sentence in refused("adapt", "--task", "bbc-topic", "--checkpoint", tmp_path, *out)
    given = ("--methods", "supmer", "--checkpoint", f"supmer={tmp_path}")
    assert sentence in refused("evaluate", "--tasks", "bbc-topic", *given, *out)
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("supmer_ray.data.prepare.prepare", full)
    message = refused("prepare", "--source", "bbc", "--out", tmp_path / "store")
    assert "No room is left where the command writes ([Errno 28] No space left on device); make some" in message


def test_ctrl_c_is_one_line(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("supmer_ray.doctor.describe", interrupted)
    done = supmer("doctor")
    assert (done.returncode, done.stderr) == (130, "supmer: stopped.\n")


def test_inputs_are_read_before_a_cluster_is_started(tmp_path, monkeypatch):
    def never():
        raise AssertionError("Ray would have been started.")

    monkeypatch.setattr("supmer_ray.data.prepare.connect", never)
    assert "did you mean 'bbc'" in refused("prepare", "--source", "bbcc", "--out", tmp_path / "out")
    assert "'hub:' names no data set" in refused("prepare", "--source", "hub:", "--out", tmp_path / "out")


def test_inputs_that_do_not_exist(tmp_path):
    out = tmp_path / "out"
    assert "There is no store" in refused("train", "--store", tmp_path / "nowhere", "--out", out)
    assert "no task" in refused("adapt", "--task", "bbc-topics", "--out", out)
    assert "adapted.json" in refused(
        "predict", "--adapted", tmp_path, "--input", "x.csv", "--output", tmp_path / "y.csv"
    )
    assert not out.exists()


def test_a_cluster_that_does_not_answer(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    message = refused("prepare", "--source", "bbc", "--out", tmp_path / "out")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE", (
        "threads that spin would take the cores of a node's other processes"
    )
    assert "is no address of a cluster that a driver can join; write HOST:PORT of its head" in message
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    message = refused("prepare", "--source", "bbc", "--out", tmp_path / "out")
    assert "The Ray cluster at RAY_ADDRESS=127.0.0.1:9 does not answer (" in message and "unset RAY_ADDRESS" in message
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # what `ray job submit` wants
    message = sentence(started("prepare", "--source", "bbc", "--out", tmp_path / "out"))
    assert "is no address of a cluster that a driver can join; write HOST:PORT of its head" in message
    assert not (tmp_path / "out").exists()


def test_doctor_replays_a_golden_file():
    done = supmer("doctor", "--golden", FIXTURE)
    assert done.returncode == 0, done.stderr
    assert "within 1e-09" in done.stdout and "meta-gradient of theta" in done.stdout


@pytest.mark.parametrize("quantity", ["task1.out.support_gradient", "task0.out.gate"])
def test_doctor_finds_a_changed_number(tmp_path, quantity):
    tensors = load_file(FIXTURE)
    tensors[quantity] = tensors[quantity] + 1e-7
    save_file(tensors, tmp_path / FIXTURE.name)
    shutil.copy(FIXTURE.with_suffix(".json"), tmp_path)
    done = supmer("doctor", "--golden", tmp_path / FIXTURE.name)
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout


def test_doctor_refuses_what_is_no_golden_file(tmp_path):
    assert "There is no golden file" in refused("doctor", "--golden", tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "bad.json").write_text("{}")
    assert "is not a golden file" in refused("doctor", "--golden", tmp_path / "bad.safetensors")
    shutil.copy(FIXTURE, tmp_path / "part.safetensors")
    facts = json.loads(FIXTURE.with_suffix(".json").read_text())
    (tmp_path / "part.json").write_text(json.dumps({key: facts[key] for key in facts if key != "per_task"}))
    message = refused("doctor", "--golden", tmp_path / "part.safetensors")
    assert "or its JSON is not a golden file of the meta-step" in message and "'per_task'" in message
    del facts["per_task"][0]["domain_sim"]
    (tmp_path / "part.json").write_text(json.dumps(facts))
    message = refused("doctor", "--golden", tmp_path / "part.safetensors")
    assert "or its JSON is not whole (KeyError: 'domain_sim')." in message
    (tmp_path / "part.json").write_text("[]")
    assert "is not a golden file" in refused("doctor", "--golden", tmp_path / "part.safetensors")
