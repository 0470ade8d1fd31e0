"""Times of CUDA work with a cold cache, the sides interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from benchmarks.gpu.sides import Step


class Timer(Protocol):
    def prepare(self, step: Step) -> Step:
        """What is to be timed in place of a step: the step itself, or its graph."""

    def start(self, step: Step) -> Callable[[], float]:
        """Runs a prepared step, and returns what tells its seconds once it is done."""


class CudaTimer:
    """By CUDA events, after memory twice the size of the L2 was written: operands come from DRAM.

    graph: the step is captured into a CUDA graph and replayed, as LoRAFusion measures, so that what Python
    and torch cost on the host is left out. Without it that counts, as far as it outlasts the cache's flush.
    """

    def __init__(self, device: torch.device, *, graph: bool) -> None:
        self._graph = graph
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def prepare(self, step: Step) -> Step:
        if not self._graph:
            return step
        # Capture wants a stream of its own, and every lazy initialisation to be over.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()

        def replay() -> object:
            graph.replay()
            return kept  # its memory is the graph's

        return replay

    def start(self, step: Step) -> Callable[[], float]:
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._flushed.zero_()
        began.record()
        step()
        ended.record()

        def seconds() -> float:
            ended.synchronize()
            return 1e-3 * float(began.elapsed_time(ended))

        return seconds


def interleaved(
    steps: Mapping[str, Step], rounds: int, timer: Timer, warm_up: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each side in each round, and why a side could not be prepared.

    The sides take turns within a round, each round begins with another one, and nothing waits until a round
    is over: what drifts, drifts for all.
    """
    prepared, failed = {}, {}
    for name, step in steps.items():
        try:
            prepared[name] = timer.prepare(step)
        except Exception as error:  # whatever capture stumbles over
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    names = list(prepared)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        first = turn % max(len(names), 1)
        pending = {name: timer.start(prepared[name]) for name in names[first:] + names[:first]}
        for name, seconds in pending.items():
            taken = seconds()
            if turn >= warm_up:
                times[name].append(taken)
    return times, failed
