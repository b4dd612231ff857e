"""The most memory that a stretch of work held: on a GPU, in this process, or in all processes below it."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Most bytes that the block held above those before it: allocated on a GPU; resident on a CPU, looked at often."""
    if device.type == "cuda":
        found, before = [0], torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    with suppress(OSError, AttributeError):  # where the C library is another than glibc
        # What was freed before the block is given back; kept, it would be the block's without being counted.
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    with _highest(lambda: _resident() - before, seconds=0.005) as found:
        yield found


@contextmanager
def peak_memory_of_all() -> Iterator[list[int]]:
    """Most bytes that this process and all below it held at once, shared pages counted once."""
    import psutil

    def held() -> int:
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    with _highest(held, seconds=0.5) as found:
        yield found


def _resident() -> int:
    with suppress(FileNotFoundError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil  # where there is no /proc

    return psutil.Process().memory_info().rss


@contextmanager
def _highest(look: Callable[[], int], seconds: float) -> Iterator[list[int]]:
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            found[0] = max(found[0], look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
