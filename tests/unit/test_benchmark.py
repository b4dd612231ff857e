"""The benchmark runs, agrees with its own baseline, and needs neither Ray nor what only preparing and settings need."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from supmer_ray.benchmark.__main__ import main
from supmer_ray.benchmark.workload import SIZES, Lengths, step_flops, task_batch

SMALL = ["--precision", "float32", "bfloat16", "--prompt", "4", "--tasks", "1", "--support", "2", "--query", "2"]
SMALL += ["--max-length", "24", "--repeats", "1"]


def test_a_gpu_machine_needs_torch_and_transformers_only():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('ray', 'datasets', 'pydantic', 'pandas', 'sklearn', 'nupunkt')); "
        "import supmer_ray.benchmark.gpu, supmer_ray.golden"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_step_is_timed_beside_the_baseline_without_ray(tmp_path):
    out = tmp_path / "speed.json"
    code = (
        "import sys, runpy; sys.modules |= dict.fromkeys(('ray', 'datasets', 'pydantic')); "
        f"sys.argv = ['benchmark', *{[*SMALL, '--size', 'mini', '--lengths', '20', '--spread', '--out', str(out)]!r}]; "
        "runpy.run_module('supmer_ray.benchmark', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(out.read_text())["steps"]
    assert row["variants"].keys() == {"baseline", "float32", "bfloat16"}
    assert row["variants"]["float32"]["gradient_difference"] < 1e-4
    assert row["variants"]["baseline"]["peak_memory_bytes"] > row["variants"]["float32"]["peak_memory_bytes"] > 2**20
    assert row["variants"]["bfloat16"]["gradient_difference"] < 3e-2
    assert "float32" in done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--lengths", "20", "450"], "The baseline pads to 412 tokens, fewer than --lengths 450; raise"),
        (["--repeats", "0"], "--repeats is 0; write 1 or more."),
        (["--lengths", "20", "-5"], "--lengths is -5; write 1 or more."),
        (["--out", "."], "--out . is a folder; name a JSON file."),
        (["--out", f"{__file__}/speed.json"], f"{__file__} is a file; name another."),
        (["--device", "mps"], "--device is mps; write cpu or cuda."),
        (["--device", "abacus"], "--device is abacus; write cpu or cuda."),
        (["--scaling", "--threads", "1", "--tasks", "2"], "and has one; give it --threads 2."),
        (["--scaling", "--tasks", "3"], "shares 3 tasks between two workers; write --tasks 4."),
        (["--data"], "needs a prepared store; name one with --store."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(monkeypatch, capsys, options, sentence):
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    threads = torch.get_num_threads()
    try:
        assert main() == 2
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("benchmark: ") and said.count("\n") == 1


def test_operations_are_counted_as_a_layer_is_made():
    """Two lengths differ by the cost of their tokens: products linear in them, attention quadratic."""
    flops = [
        step_flops("mini", task_batch(2, 4, 4, Lengths.fixed(length), seed=0)[0], prompt=0) for length in (10, 20, 40)
    ]
    shape = SIZES["mini"]
    inner = shape["d_kv"] * shape["num_heads"]
    attention = 3 * 4 * inner * shape["num_layers"] * 24  # of 24 examples, a squared token
    # f(40) − 3 f(20) + 2 f(10) leaves the quadratic part alone: 1600 − 1200 + 200.
    assert flops[2] - 3 * flops[1] + 2 * flops[0] == pytest.approx(600 * attention)


def test_lengths_of_text_are_spread_around_their_mean():
    pool = Lengths.spread(60, 412).pool
    assert abs(pool.mean() - 60) < 3 and pool.std() > 20 and pool.max() <= 412
    assert np.array_equal(pool, Lengths.spread(60, 412).pool)
