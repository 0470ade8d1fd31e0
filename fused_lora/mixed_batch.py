"""Batches whose rows belong to different adapters: from names to the op's adapter_index."""

from __future__ import annotations

import functools
from collections.abc import Container

import torch
from torch import Tensor

# The layers of a model are given the same names one after another.
_made: dict[tuple[tuple[str | None, ...], tuple[str, ...], torch.device], Tensor] = {}
_MOST = 64


def present(names: tuple[str | None, ...], known: Container[str]) -> tuple[str, ...]:
    """Each name once, in order, of those that are known."""
    each_once = _each_once.__wrapped__ if torch.compiler.is_compiling() else _each_once
    return tuple([name for name in each_once(names) if name in known])


@functools.lru_cache(maxsize=_MOST)
def _each_once(names: tuple[str | None, ...]) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if name is not None)


def adapter_index(names: tuple[str | None, ...], adapters: tuple[str, ...], device: torch.device) -> Tensor:
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


def _make(names: tuple[str | None, ...], adapters: tuple[str, ...], device: torch.device) -> Tensor:
    places = {name: place for place, name in enumerate(adapters)}
    numbers = [-1 if name is None else places.get(name, -1) for name in names]
    with torch.inference_mode(False):  # so that autograd may save it later
        return torch.tensor(numbers, dtype=torch.int64, device=device)
