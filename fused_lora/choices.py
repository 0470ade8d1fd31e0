"""Which of two paths "auto" takes: the fused kernels, or torch's own GEMMs (composed).

The compiled half asks `decide` at the first call of a class of shapes (dtypes, rank, sizes, rows by powers of
two, layouts, dropout, the gradients that are needed, on the CPU the number of threads) and keeps the answer
for the process, so that a checkpoint's recompute takes the path of its forward. Of these rules the first that
applies decides:

1. Under torch.use_deterministic_algorithms nothing is asked. The fused kernels serve where they are presumed
   faster: on the CPU everywhere; on a GPU if all of them are tensor-core kernels, and the device's tensor
   cores have no instructions beyond theirs (Hopper and data-centre Blackwell do) or the rows are at most 128.
   Else composed does. No result depends on a file or a clock.
2. In a job of several ranks nothing is timed, since ranks would differ and a rank that waits for its GPU may
   hold up another. The first rule decides, until `share_choices` hands every rank what rank 0 remembers.
3. What was timed before on this kind of device, with these versions, is remembered on disk.
4. Both are timed on the call's own operands, once: up to a few tens of milliseconds on the CPU, a
   synchronisation on a GPU. The first rule's path is taken unless the other one was clearly faster: less is
   noise, and would be remembered. Nothing is timed while a CUDA graph is captured, nor with
   FUSED_LORA_TIMING=0: there the first rule decides, for the rest of the process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_lora._version import __version__
from fused_lora.binary import BINARY, FusedLoRAWarning

DIRECTORY_VARIABLE = "FUSED_LORA_CACHE_DIR"
TIMING_VARIABLE = "FUSED_LORA_TIMING"
PATHS = ("fused", "composed")
CLEARLY_FASTER = 0.97  # of the other path's time, at most

Timer = Callable[[], "tuple[float, float] | None"]


@dataclass(frozen=True)
class Choice:
    path: str
    reason: str


# {shape class: (path, milliseconds of fused, of composed)}
Table = dict[str, tuple[str, float, float]]

_lock = threading.Lock()
_made: dict[tuple[str, str], Choice] = {}
_remembered: dict[Path, Table] = {}
_shared: Table = {}


def decide(device: str, shape: str, presumed_faster: bool, time: Timer | None) -> str:
    """The path for a shape class on a device ("cpu", "cuda:0"); the rules are the module's.

    time runs both paths and returns their milliseconds, None where memory does not suffice; it is None itself
    where nothing can be timed.
    """
    choice = _decide(device, shape, presumed_faster, time)
    with _lock:
        return _made.setdefault((device, shape), choice).path


def _decide(device: str, shape: str, presumed_faster: bool, time: Timer | None) -> Choice:
    if several_ranks():
        if shape in _shared:
            return _timed(_shared[shape], "on rank 0")
        return untimed(presumed_faster, "several ranks")
    path = file_of(_device_name(device))
    table = _table(path)
    if shape in table:
        return _timed(table[shape], "remembered")
    if time is None:
        return untimed(presumed_faster, "a CUDA graph is captured")
    if os.environ.get(TIMING_VARIABLE) == "0":
        return untimed(presumed_faster, f"{TIMING_VARIABLE}=0")
    times = time()
    if times is None:
        return untimed(presumed_faster, "too little memory to time both")
    fused, composed = times
    fused_limit = composed / CLEARLY_FASTER if presumed_faster else composed * CLEARLY_FASTER
    entry = ("fused" if fused <= fused_limit else "composed", fused, composed)
    _remember(path, shape, entry)
    return _timed(entry, "timed now")


def untimed(presumed_faster: bool, why: str) -> Choice:
    """The choice where nothing was timed."""
    if presumed_faster:
        return Choice("fused", f"not timed ({why}), and its kernels are presumed faster here")
    return Choice("composed", f"not timed ({why}), and the fused kernels are not presumed faster here")


def _timed(entry: tuple[str, float, float], when: str) -> Choice:
    path, fused, composed = entry
    slower = fused > composed if path == "fused" else composed > fused
    close = ", not clearly less" if slower else ""
    return Choice(path, f"fused took {fused:.4g} ms, composed {composed:.4g} ms{close} ({when})")


def made(device: str, shape: str) -> Choice | None:
    """The choice that this process made for a shape class."""
    return _made.get((device, shape))


def several_ranks() -> bool:
    """Whether this process belongs to a job of several, begun by a launcher or through torch.distributed."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdecimal() and int(world) > 1:
        return True
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def share_choices() -> int:
    """Give every rank of a job the choices that rank 0 remembers, and return their number.

    A collective: call it on all ranks, at the same point, before the first step. What a single process timed
    before, in a run of its own, then counts for the job.
    """
    distributed = torch.distributed
    tables: list[Table | None] = [None]
    if distributed.get_rank() == 0:
        tables[0] = {
            shape: entry
            for device in _devices()
            for shape, entry in _table(file_of(_device_name(device))).items()
        }
    distributed.broadcast_object_list(tables, src=0)
    assert tables[0] is not None
    with _lock:
        _shared.clear()
        _shared.update(tables[0])
        _made.clear()
    if BINARY.module is not None:
        BINARY.module.forget_choices()
    return len(_shared)


def directory() -> Path:
    """Where choices are remembered."""
    if os.environ.get(DIRECTORY_VARIABLE):
        return Path(os.environ[DIRECTORY_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-lora"


def file_of(device_name: str) -> Path:
    """One file for a kind of device and everything whose speed was compared on it."""
    commit = BINARY.facts.get("commit", "unknown")
    versions = f"{__version__}-{commit} torch-{torch.__version__} cuda-{torch.version.cuda}"
    return directory() / (re.sub(r"[^\w.+-]+", "_", f"{device_name} fused-lora-{versions}") + ".json")


def _devices() -> list[str]:
    """Those whose choices a job shares: the CPU, and the current GPU where there is one. What they remember
    does not collide: a class of the CPU names its threads."""
    return ["cpu", *([f"cuda:{torch.cuda.current_device()}"] if torch.cuda.is_available() else [])]


def _device_name(device: str) -> str:
    return processor_name() if device == "cpu" else torch.cuda.get_device_name(torch.device(device))


@functools.cache
def processor_name() -> str:
    """The CPU's model, where the system tells it; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _table(path: Path) -> Table:
    """What a file remembers; read once a process."""
    with _lock:
        if path not in _remembered:
            _remembered[path], problem = _read(path)
            if problem is not None:
                message = f"fused_lora ignores {path}, which it cannot read ({problem}), and times anew"
                warnings.warn(message, FusedLoRAWarning, stacklevel=2)
        return _remembered[path]


def _read(path: Path) -> tuple[Table, str | None]:
    """The table, and what is wrong with the file. That there is none is not wrong."""
    try:
        content = json.loads(path.read_bytes())
        return {str(shape): _entry(entry) for shape, entry in content.items()}, None
    except OSError:
        return {}, None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        return {}, repr(error)


def _entry(entry: dict[str, object]) -> tuple[str, float, float]:
    path = entry["path"]
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    return str(path), float(str(entry["fused_ms"])), float(str(entry["composed_ms"]))


def _remember(path: Path, shape: str, entry: tuple[str, float, float]) -> None:
    """Adds to the file what was timed. Where it cannot be written, other processes time again."""
    with _lock:
        table = _remembered[path]
        table[shape] = entry
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            merged = {**_read(path)[0], **table}  # other processes may have written since
            rows = {
                known: {"path": taken, "fused_ms": fused, "composed_ms": composed}
                for known, (taken, fused, composed) in sorted(merged.items())
            }
            # A reader sees the old file or the new one, never a part.
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                written = Path(scratch) / path.name
                written.write_text(json.dumps(rows, indent=1) + "\n")
                written.replace(path)
