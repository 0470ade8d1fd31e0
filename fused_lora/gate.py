"""Who computes with a model's adapters and who changes them: never both at once.

A hold keeps a model's adapters as they are for as long as a thread needs them so: a forward, or a generation
of many. A swap changes them while nobody else holds them. It waits for the holds that it finds; a hold that
comes later waits for it, so that a swap's turn comes however many requests there are. What is slow about a
swap, reading and checking a file, is done before it: it keeps others waiting for as long as it takes to copy
an adapter.

Nothing is kept on a model, and a forward takes no lock: the cost is that of entering a context.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass(eq=False)
class _Hold:
    model: nn.Module
    thread: int


@dataclass(eq=False)
class _Swap:
    model: nn.Module
    thread: int
    begun: bool = False


_changed = threading.Condition()
_holds: list[_Hold] = []
_swaps: list[_Swap] = []


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Within this context the adapters of `model` stay as they are: swaps by other threads wait for its end.

        with fused_lora.held(model):
            model.generate(...)  # every token of it by the same adapters

    Swaps are what changes a whole model's adapters: load_adapter, delete_adapter, set_adapter, add_lora,
    remove_lora, merge, unmerge, disabled, and what is done within `swapping`. Any number of threads may hold
    a model at once. A forward outside of this context may meet some layers before a swap and some after it.
    """
    hold = _Hold(model, threading.get_ident())
    with _changed:
        # Who holds something already does not wait for a swap that itself may wait for it.
        holds_already = _holds_of(hold.thread)
        _changed.wait_for(lambda: not any(_bars(swap, hold, bool(holds_already)) for swap in _swaps))
        _holds.append(hold)
    try:
        yield
    finally:
        with _changed:
            _holds.remove(hold)
            _changed.notify_all()


@contextmanager
def swapping(model: nn.Module) -> Iterator[None]:
    """Within this context no other thread holds `model`, so that its adapters may change.

        with fused_lora.swapping(peft_model):
            peft.utils.hotswap.hotswap_adapter(peft_model, directory, "default")

    Waits for the holds of other threads. Raises RuntimeError where that may be for ever: if this thread
    itself holds a model, or swaps in another one, and another thread holds this one.
    """
    swap = _Swap(model, threading.get_ident())
    with _changed:
        outer = [other for other in _swaps if other.begun and other.thread == swap.thread]
        if not any(_share(other.model, model) for other in outer):
            _wait_for_turn(swap, may_wait=not outer and not _holds_of(swap.thread))
        swap.begun = True
        _swaps.append(swap)
    try:
        yield
    finally:
        with _changed:
            _swaps.remove(swap)
            _changed.notify_all()


def _wait_for_turn(swap: _Swap, may_wait: bool) -> None:
    def ahead() -> bool:
        return any(s.begun and _share(s.model, swap.model) for s in _swaps) or any(
            hold.thread != swap.thread and _share(hold.model, swap.model) for hold in _holds
        )

    if not ahead():
        return
    if not may_wait:
        raise RuntimeError(
            "model: another thread holds it (fused_lora.held), and this thread holds a model itself: change "
            "adapters outside of held and use_adapters"
        )
    _swaps.append(swap)  # from here on who comes waits for it
    try:
        _changed.wait_for(lambda: not ahead())
    finally:
        _swaps.remove(swap)
        _changed.notify_all()


def _bars(swap: _Swap, hold: _Hold, holds_already: bool) -> bool:
    """Whether the hold must wait for the swap."""
    if swap.thread == hold.thread or (holds_already and not swap.begun):
        return False
    return _share(swap.model, hold.model)


def _share(one: nn.Module, other: nn.Module) -> bool:
    """Whether a module is in both: one is a part of the other, a wrapper of it, or shares its layers."""
    if one is other:
        return True
    own = set(one.modules())
    return any(module in own for module in other.modules())


def _holds_of(thread: int) -> list[_Hold]:
    return [hold for hold in _holds if hold.thread == thread]


def _begin_anew() -> None:
    """In a forked child: the threads that held or swapped do not live on in it."""
    global _changed
    _changed = threading.Condition()
    thread = threading.get_ident()
    _holds[:] = _holds_of(thread)
    _swaps[:] = [swap for swap in _swaps if swap.thread == thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
