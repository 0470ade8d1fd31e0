"""Batches whose rows belong to different adapters: from names to the op's adapter_index."""

from __future__ import annotations

import functools
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Names = tuple[str | None, ...]
# torch hands what is stashed here on to the threads that it runs a backward in.
_STASH = "fused_lora_names"


class NamesOfThread(threading.local):
    """A layer's adapters, one for each element of the batch that a thread computes; None outside of
    `use_adapters`."""

    def __init__(self) -> None:
        # Of the instance: torch.compile guards on no other attribute of a threading.local.
        self.names: Names | None = None

    def __reduce__(self) -> tuple[type[NamesOfThread], tuple[()]]:
        return NamesOfThread, ()  # a copy is in no context

    def now(self) -> Names | None:
        names = self.names
        if names is None and not torch.compiler.is_compiling() and torch._C._is_key_in_tls(_STASH):
            # A checkpoint that is computed again in a backward's own thread.
            names = torch._C._get_obj_in_tls(_STASH).get(self)
        return names


@contextmanager
def naming(layers: Sequence[NamesOfThread], names: Names) -> Iterator[None]:
    """Within this context the layers have these names, in this thread and in backwards that it calls."""
    before = [layer.names for layer in layers]
    stashed = torch._C._get_obj_in_tls(_STASH) if torch._C._is_key_in_tls(_STASH) else {}
    for layer in layers:
        layer.names = names
    torch._C._stash_obj_in_tls(_STASH, {**stashed, **dict.fromkeys(layers, names)})
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_STASH, stashed)
        for layer, own in zip(layers, before, strict=True):
            layer.names = own


# The layers of a model are given the same names one after another.
_made: dict[tuple[Names, tuple[str, ...], torch.device], Tensor] = {}
_MOST = 64


def present(names: Names, known: Container[str]) -> tuple[str, ...]:
    """Each name once, in order, of those that are known."""
    each_once = _each_once.__wrapped__ if torch.compiler.is_compiling() else _each_once
    return tuple([name for name in each_once(names) if name in known])


@functools.lru_cache(maxsize=_MOST)
def _each_once(names: Names) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if name is not None)


def adapter_index(names: Names, adapters: tuple[str, ...], device: torch.device) -> Tensor:
    """For every name its place in `adapters`, or -1. Made once for the layers that ask alike."""
    if torch.compiler.is_compiling():
        return _make(names, adapters, device)
    key = (names, adapters, device)
    index = _made.get(key)
    if index is None:
        index = _make(names, adapters, device)
        if type(index) is Tensor:  # and no fake one
            if len(_made) >= _MOST:
                _made.clear()
            _made[key] = index
    return index


def _make(names: Names, adapters: tuple[str, ...], device: torch.device) -> Tensor:
    places = {name: place for place, name in enumerate(adapters)}
    numbers = [-1 if name is None else places.get(name, -1) for name in names]
    with torch.inference_mode(False):  # so that autograd may save it later
        return torch.tensor(numbers, dtype=torch.int64, device=device)
