"""A linear's weight held packed, until something looks at it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.binary import BINARY

WEIGHT = "weight"


class PacksWeight:
    """A layer whose forward takes a packed weight as well as a plain one."""

    __slots__ = ()  # so that a plain linear may become such a layer, by its __class__

    def linear_to_pack(self) -> tuple[nn.Module, bool]:
        """The module that holds the frozen weight, and whether it stores it in_features×out_features."""
        raise NotImplementedError

    def needs_plain_weight(self) -> str | None:
        """Why the next forward would look at the plain weight; None where it would not."""
        raise NotImplementedError


class PackedParameters(dict[str, Any]):
    """A module's `_parameters` while its weight is packed and the weight's Parameter holds no data.

    nn.Module finds its Parameters in that dict: `.weight`, parameters(), state_dict(), to(), copies and
    pickles all come through it. So any use of it that is not about another Parameter first unpacks the
    weight into the same Parameter and gives the module its own dict back. Whoever keeps this one is led to
    the module's own. What reads a dict in C, past the methods of its type, finds the Parameter without data:
    an error, never another number.

    A forward takes `packed`, which is None once the weight is plain, and keeps it alive itself.
    """

    __slots__ = ("_module", "_strides", "_transposed", "packed", "plain")
    packed: Tensor | None
    plain: dict[str, Any]  # the module's own

    def __init__(self, module: nn.Module, transposed: bool) -> None:
        super().__init__()
        plain: dict[str, Any] = module._parameters
        self.plain = plain
        weight = plain[WEIGHT]
        assert BINARY.module is not None
        self.packed = BINARY.module.pack_parameter(weight, transposed)
        self._module = weakref.ref(module)
        self._strides = weight.stride()
        self._transposed = transposed

    def restored(self) -> dict[str, Any]:
        """The module's own dict, with the weight in it."""
        if self.packed is not None:
            with _lock:
                self._restore()
        return self.plain

    def _restore(self) -> None:
        if self.packed is None:  # another thread was first
            return
        assert BINARY.module is not None
        BINARY.module.restore_parameter(self.plain[WEIGHT], self.packed, self._strides, self._transposed)
        self._give_back()

    def _give_back(self) -> None:
        module = self._module()
        if module is not None:
            module.__dict__["_parameters"] = self.plain
        self.packed = None

    def __contains__(self, name: object) -> bool:
        return name in self.plain

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, name: str) -> Any:
        return (self.restored() if name == WEIGHT else self.plain)[name]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # copy, deepcopy and pickle: a plain dict.
        return dict, (self.restored(),)


def _led_to_plain(name: str) -> Callable[..., Any]:
    def method(self: PackedParameters, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.restored(), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    *("__setitem__", "__delitem__", "__iter__", "__reversed__", "__repr__", "__eq__", "__ne__"),
    *("__or__", "__ror__", "__ior__", "get", "keys", "values", "items", "copy"),
    *("pop", "popitem", "setdefault", "update", "clear"),
):
    setattr(PackedParameters, _name, _led_to_plain(_name))

_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# A thread that held it does not live on in the child; what it was about is as if not begun.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def packed_weight(module: nn.Module) -> Tensor | None:
    """The module's weight in panels (torch.ops.fused_lora.pack_weight), where it is packed now."""
    parameters = module._parameters
    return parameters.packed if type(parameters) is PackedParameters else None


def held_weight(module: nn.Module) -> Tensor:
    """The module's weight as it is held now: plain as the module stores it, or packed (3-D)."""
    parameters = module._parameters
    if type(parameters) is PackedParameters:
        packed = parameters.packed
        if packed is not None:
            return packed
    # Past nn.Module's own lookup, which takes 1 µs; what is no Parameter (weight_norm's) is found there.
    weight = parameters.get(WEIGHT)
    return module.weight if weight is None else weight  # type: ignore[return-value]


def plain_parameters(module: nn.Module) -> dict[str, Any]:
    """The module's own dict of Parameters, without a look at the weight."""
    parameters = module._parameters
    return parameters.plain if isinstance(parameters, PackedParameters) else parameters


def pack_weight(module: nn.Module, transposed: bool) -> Tensor | None:
    """Packs the weight of a module that has it plain; None, and nothing changes, where something else refers
    to the module's dict, to the Parameter or to its memory."""
    assert BINARY.module is not None
    with _lock:
        if type(module._parameters) is not dict:  # another thread was first
            return packed_weight(module)
        alone = _references_of_one_alone()
        if BINARY.module.references(module._parameters) != alone:
            return None
        parameters = PackedParameters(module, transposed)
        packed = parameters.packed
        # First the dict and then the Parameter: a look that comes between waits for the lock.
        module.__dict__["_parameters"] = parameters
        if not BINARY.module.empty_unless_held(parameters.plain, alone):
            parameters._give_back()
            return None
        dict.update(parameters, parameters.plain)
        return packed


def unpack_weight(module: nn.Module) -> None:
    """Makes the module's weight plain, where it is packed."""
    parameters = module._parameters
    if isinstance(parameters, PackedParameters):
        parameters.restored()


def _references_of_one_alone() -> list[int]:
    """The references where nothing else refers to a weight; a dict is counted as an object's attribute."""
    assert BINARY.module is not None
    parameters: dict[str, Any] = {WEIGHT: nn.Parameter(torch.empty(1, device="cpu"), requires_grad=False)}
    module = SimpleNamespace(_parameters=parameters)
    del parameters
    references: list[int] = BINARY.module.references(module._parameters)
    return references
