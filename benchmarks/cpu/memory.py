"""What a forward and backward keeps, and what it needs at its worst.

Saved bytes are of the storages that autograd saves a tensor of, each counted once and whole, as that is what
stays allocated; x, W, A and B, which are there anyway, left out.

Peak bytes are of tensors: the highest sum of what torch's allocator has given and not got back since the step
began, from the profiler's record of every allocation. That is exact and the same in every run. A process's
resident memory would tell pages, and what the C library has not returned. Not counted are buffers that
libraries hold outside torch's allocator: oneDNN's and MKL's, and the scratch of our kernels, which is fixed
(some 3 MiB a thread; beside it, with dropout, a bit for each element of x).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.cpu.turns import Side


def saved_bytes(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Of a call that builds a graph, with its backward or without; `known` are tensors that are left out."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in left_out)


def peak_bytes(sides: Mapping[str, Side]) -> dict[str, int]:
    """Of one call of each side, warm ones, under one profiler: starting it takes longer than most calls."""
    labels = {f"side {name}": name for name in sides}
    with (
        _quiet(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile,
    ):
        for label, name in labels.items():
            with sides[name].context(), torch.profiler.record_function(label):
                kept = sides[name].call()  # its memory is the step's
            del kept
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks = {}
    for event in events:
        if event.name() in labels:
            began, ended = event.start_ns(), event.start_ns() + event.duration_ns()
            peaks[labels[event.name()]] = highest(b for at, b in changes if began <= at <= ended)
    return peaks


def highest(changes: Iterable[int]) -> int:
    """The highest of the sums up to each change."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Some builds of the profiler write a line to the process's stderr whenever it starts or stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
