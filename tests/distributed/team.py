"""Several processes of one job, over gloo, that run functions of the tests at the same time.

A team lives for many tests: its processes are forked from a server that has imported what they need. A
process that fails or hangs costs the team, and the next test a new one.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

SECONDS = 60  # for a function to return, on a busy machine
SECONDS_TO_START = 240  # torch, PEFT and transformers are imported

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "fused_lora.peft_layers"]
)


class Team:
    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) in every process, by its import path; what they return, by rank. A failure in one
        is raised here, with its traceback."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._results(SECONDS)

    def _results(self, seconds: float) -> list[Any]:
        results: dict[int, Any] = {}
        end = monotonic() + seconds
        while len(results) < self.size:
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(pending, timeout=max(0.0, end - monotonic()))
            if not ready:
                missing = sorted(set(range(self.size)) - set(results))
                self.stop()
                raise TimeoutError(f"ranks {missing} of {self.size} did not return within {seconds} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failed, value = pipe.recv()  # type: ignore[union-attr, call-arg]
                except EOFError:
                    failed, value = True, "the process ended"
                if failed:
                    self.stop()
                    raise AssertionError(f"rank {rank} of {self.size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        rendezvous = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            arguments = (rank, self.size, rendezvous, theirs, dict(os.environ))
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._results(SECONDS_TO_START)


def _serve(rank: int, size: int, rendezvous: Path, pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server's may be older than what a fixture has set since
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # as launchers do
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    pipe.send((False, None))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            result = False, function(*args)
        except BaseException:
            result = True, traceback.format_exc()
        pipe.send(result)
