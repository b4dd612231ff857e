"""`python -m supmer_ray.benchmark`: the speed of the meta-step on this machine, printed and as JSON."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from supmer_ray.benchmark.step import StepSettings, measure_step, timed
from supmer_ray.benchmark.workload import SIZES, Lengths
from supmer_ray.errors import UserError, require_writable
from supmer_ray.files import write_json


def main() -> int:
    options = _parser().parse_args()
    try:
        report = _measure(options)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    _write(options, report)
    if options.out:
        print(f"\nJSON: {options.out}")
    return 0


def _write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.out:
        write_json(options.out, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m supmer_ray.benchmark", description=__doc__)
    parser.add_argument("--size", nargs="+", default=["mini"], choices=SIZES, help="models with random weights")
    parser.add_argument("--lengths", nargs="+", type=int, default=[60, 150, 390], help="tokens of every example")
    parser.add_argument("--spread", action="store_true", help="lengths spread around those means instead")
    parser.add_argument("--store", type=Path, help="a prepared store: its real lengths, and what --data builds from")
    parser.add_argument("--prompt", type=int, default=100, help="rows of the prompt")
    parser.add_argument("--tasks", type=int, default=4, help="meta-tasks a step")
    parser.add_argument("--support", type=int, default=16, help="support examples a task")
    parser.add_argument("--query", type=int, default=16, help="query examples a task")
    parser.add_argument("--max-length", type=int, default=412, help="what the baseline pads to")
    parser.add_argument("--tokens", type=int, help="of a micro-batch of our step; unset: what suits the device")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), help="of our frozen weights")
    parser.add_argument("--repeats", type=int, default=5, help="alternating rounds; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; unset: torch's choice")
    parser.add_argument(
        "--no-baseline", action="store_true", help="time our step alone (sizes the baseline cannot hold)"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward")
    parser.add_argument("--compiled", action="store_true", help="on a CPU: also time our step with its norms compiled")
    parser.add_argument("--gpu", action="store_true", help="everything that is asked of a GPU, in one go")
    parser.add_argument("--data", action="store_true", help="measure the builder of meta-tasks on --store")
    parser.add_argument("--scaling", action="store_true", help="measure one worker against two at each --lengths")
    parser.add_argument("--fewshot", action="store_true", help="measure adapting many runs together")
    parser.add_argument("--embed", action="store_true", help="measure embedding of --store's sentences")
    parser.add_argument("--prepare", nargs="+", type=int, metavar="DOCUMENTS", help="measure preparing so much of bbc")
    parser.add_argument("--out", type=Path, help="JSON file for everything measured")
    return parser


def _require_measurable(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a number that counts something is below 1, the device is of no kind that is measured or not there,
            or the JSON cannot be written.
    """
    for name, given in vars(options).items():
        for number in given if isinstance(given, list) else [given]:
            if isinstance(number, int) and not isinstance(number, bool) and number < 1:
                raise UserError(f"--{name.replace('_', '-')} is {number}; write 1 or more.")
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device is {options.device}; write cpu or cuda.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device is {options.device}, and torch finds no GPU here; leave it out to measure the CPU.")
    if options.out:
        if options.out.is_dir():
            raise UserError(f"--out {options.out} is a folder; name a JSON file.")
        require_writable(options.out)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    _require_measurable(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    report: dict[str, Any] = {"machine": machine(options.device), "command": " ".join(sys.argv[1:])}
    if options.data:
        from supmer_ray.benchmark.data import measure_data

        report["data"] = measure_data(_store(options), print)
        torch.set_num_threads(threads)  # a builder and an embedder have one
    if options.embed:
        from supmer_ray.benchmark.data import measure_embedding

        report["embedding"] = measure_embedding(_store(options), options.device, print)
        torch.set_num_threads(threads)
    if options.prepare:
        from supmer_ray.benchmark.data import measure_prepare

        report["prepare"] = measure_prepare(options.prepare, print)
    if options.fewshot:
        from supmer_ray.benchmark.fewshot import measure_fewshot

        report["fewshot"] = measure_fewshot(options.device, options.repeats, print)
    if options.scaling:
        from supmer_ray.benchmark.scaling import measure_scaling

        report["scaling"] = [
            measure_scaling(size, length, options, print) for size in options.size for length in options.lengths
        ]
    if options.gpu:
        from supmer_ray.benchmark.gpu import measure_gpu

        report["gpu"] = measure_gpu(options, print, lambda found: _write(options, {**report, "gpu": found}))
        print_steps(report["gpu"]["steps"])
    asked = (options.data, options.fewshot, options.scaling, options.embed, options.prepare, options.gpu)
    if not any(asked):
        report["steps"] = _steps(options)
    return report


def _steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    if not (options.no_baseline or options.store) and max(options.lengths) > options.max_length:
        raise UserError(
            f"The baseline pads to {options.max_length} tokens, fewer than --lengths {max(options.lengths)}; raise "
            "--max-length, or leave the baseline out with --no-baseline."
        )
    precisions = options.precision or _precisions(options.device)
    rows = []
    for size in options.size:
        settings = StepSettings(
            size=size,
            device=options.device,
            prompt=options.prompt,
            tasks=options.tasks,
            support=options.support,
            query=options.query,
            max_length=options.max_length,
            token_budget=options.tokens,
            precisions=tuple(precisions),
            repeats=options.repeats,
            baseline=not options.no_baseline,
            checkpointing=options.checkpointing,
            compiled=options.compiled,
        )
        if options.store:
            chosen = [Lengths.of_store(options.store, options.max_length)]
        elif options.spread:
            chosen = [Lengths.spread(length, options.max_length) for length in options.lengths]
        else:
            chosen = [Lengths.fixed(length) for length in options.lengths]
        rows += [measure_step(settings, lengths, lambda line: print(line, file=sys.stderr)) for lengths in chosen]
    print_steps(rows)
    return rows


def _precisions(device: str) -> list[str]:
    """What our step is timed in unless that is said: half precision on a GPU; on a CPU also where it is faster."""
    if device.startswith("cuda"):
        return ["bfloat16"]
    cpu, one = torch.device("cpu"), torch.randn(512, 512)
    half = one.bfloat16()
    if min(timed(lambda: half @ half, cpu) for _ in range(3)) < min(timed(lambda: one @ one, cpu) for _ in range(3)):
        return ["float32", "bfloat16"]
    print("bfloat16 is left out: this processor is slower in it; --precision bfloat16 asks for it.", file=sys.stderr)
    return ["float32"]


def print_steps(rows: list[dict[str, Any]]) -> None:
    print(f"{'size':9} {'length':>9} {'step':>17} {'median s':>9} {'× base':>7} {'tasks/s':>8} {'tokens/s':>9} "
          f"{'GFLOP/s':>8} {'of peak':>8} {'MiB':>6} {'Δ grad':>8}")  # fmt: skip
    for row in rows:
        for name, one in row["variants"].items():
            difference = f"{one['gradient_difference']:.1e}" if one["gradient_difference"] is not None else "–"
            speedup = f"{one['speedup']:.2f}" if one["speedup"] else "–"
            name += " checkp." if row["checkpointing"] else ""
            print(
                f"{row['size']:9} {row['lengths']:>9} {name:>17} {one['seconds']:9.3f} {speedup:>7} "
                f"{one['tasks_per_second']:8.2f} {one['tokens_per_second']:9,.0f} "
                f"{one['model_flops_per_second'] / 1e9:8.0f} {one['peak_fraction']:8.0%} "
                f"{one['peak_memory_bytes'] / 2**20:6.0f} {difference:>8}"
            )


def _store(options: argparse.Namespace) -> Path:
    if not options.store:
        raise UserError("This measurement needs a prepared store; name one with --store.")
    return options.store


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
