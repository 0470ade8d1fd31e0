"""Layers that are called with one and the same tensor, computed by one call of the op.

q, k and v of an attention, gate and up of an MLP: the first of such siblings that is called computes all of
them, and each of the others takes its result when it is called with that very tensor. No source is patched:
the tensor is known by its identity and its version counter.

A result is taken only where the layer would have computed it now: with the same tensor, unchanged since, the
same Parameters, unchanged since, the same adapter, and under the same modes of torch. Else the layer computes
by itself. Results are held by the thread that computed them, no longer than the tensor lives, and at most
those of one call: the next such call drops them. Layers whose result was not taken do not share their input
(the query and the key of a cross-attention do not): from then on they are apart from those that took theirs.

What computing together spares is done once for all: sums of gradients, casts of x under autocast and the
copies of it that are saved. Knowing that one may takes some tens of microseconds of Python. So "auto" does it
in training, from as many rows on as make that small; two layers, which spare one sum, under autocast alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import has_torch_function

from fused_lora import paths
from fused_lora.ops import lora_linear_grouped

GROUP = "_fused_lora_group"  # in a layer's __dict__, where it has one
MODES = ("auto", "always", "never")
FEWEST_ROWS = 512  # that "auto" computes together


class Operands(NamedTuple):
    """What one call of the op computes a layer from, beside x."""

    weight: Tensor  # as it is held: out_features×in_features, in_features×out_features, or packed
    transposed: bool  # the second of these
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float  # 0 where it does not train

    def oriented_weight(self) -> Tensor:
        return self.weight.t() if self.transposed and self.weight.dim() == 2 else self.weight


class Groupable:
    """A layer whose output may be computed ahead, together with its siblings'."""

    __slots__ = ()  # so that a plain linear may become such a layer, by its __class__
    in_features: int

    def operands(self) -> Operands | None:
        """None where the layer's state asks for more than one call of the op, or another."""
        raise NotImplementedError

    def why_base_not_fused(self) -> str | None:
        """Why no call of this op computes the layer, whatever its state; None where one may."""
        return None


def pays(layer: Groupable, x: Tensor) -> bool:
    """Whether a layer that has a group is to be computed together with it."""
    # A traced graph holds the layers' own calls: identities mean nothing there.
    if torch.compiler.is_compiling():
        return False
    if _asked != "auto":
        return _asked == "always"
    # A backward of one of the outputs frees what was saved for all. Of a tensor that was computed, with what
    # it was computed from, it did so before.
    if x.is_leaf or not torch.is_grad_enabled():
        return False
    if x.numel() < FEWEST_ROWS * layer.in_features:
        return False
    group: Group = layer.__dict__[GROUP]
    return group.size > 2 or torch.is_autocast_enabled(x.device.type)


def computed_together(layer: Groupable, x: Tensor, operands: Operands | None) -> Tensor | None:
    """The output of a layer that has a group: a sibling's call has made it, or this one makes its siblings'.
    None if the layer is to compute by itself."""
    if operands is None:
        return None
    group: Group = layer.__dict__[GROUP]
    return group.output(layer, x, operands)


def how_computed(layers: int, rows: int | None, dropout: bool, autocast: bool) -> str:
    """How so many layers that share an input of so many rows are computed now, and why: in words."""
    if _asked == "never":
        return "each by a call of its own: use_groups is 'never'"
    if dropout:
        return "each by a call of its own: it draws its mask when it is called"
    if _asked == "always":
        return "by one call (lora_linear_grouped): use_groups is 'always'"
    if layers == 2 and not autocast:
        return "each by a call of its own: two of them spare one sum, except under autocast"
    if rows is not None and rows < FEWEST_ROWS:
        return f"each by a call of its own: {rows} rows are fewer than {FEWEST_ROWS}"
    least = "" if rows is not None else f", from {FEWEST_ROWS} rows on"
    return f"in training by one call (lora_linear_grouped){least}; without gradients each by its own"


class Group:
    """Siblings that are expected to share their input. They are referred to weakly, and refer to it.

    A copy, or what a pickle holds, is empty and open: its layers, copied with it, join as they are called.
    """

    __slots__ = ("__weakref__", "_layers", "_open", "reason")

    def __init__(self, layers: Sequence[Groupable] = (), reason: str | None = None) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._open = not layers
        self.reason = reason  # why it is no larger
        for layer in layers:
            layer.__dict__[GROUP] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, ()

    @property
    def size(self) -> int:
        return len(self._layers)

    def layers(self) -> list[Groupable]:
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def output(self, layer: Groupable, x: Tensor, operands: Operands) -> Tensor | None:
        """The layer's output, if the group has it or can compute more than it; None if the layer is to
        compute by itself."""
        held = _thread.held
        if held is not None and held.are_of(self, x):
            return held.take(layer, x, operands)
        conclude()
        group: Group = layer.__dict__[GROUP]  # which the layer may just have been parted from
        return group._compute_all(layer, x, operands)

    def _compute_all(self, layer: Groupable, x: Tensor, operands: Operands) -> Tensor | None:
        siblings = self._siblings(layer)
        if not siblings or not _may_lead(layer, x, operands):
            return None
        called = {id(layer): operands}
        for sibling in siblings:
            own = _operands_beside(sibling, layer, operands)
            if own is not None:
                called[id(sibling)] = own
        every = list(called.values())
        tensors = [x, *(t for own in every for t in (own.weight, own.lora_a, own.lora_b))]
        if len(every) == 1 or has_torch_function(tensors):
            return None
        try:
            versions = [_versions(own) for own in every]
            modes = _modes(x.device)
            ys = lora_linear_grouped(
                x,
                [own.oriented_weight() for own in every],
                [own.lora_a for own in every],
                [own.lora_b for own in every],
                [own.bias for own in every],
                scalings=[own.scaling for own in every],
            )
        except Exception:
            # Memory that does not suffice for all, a sibling that is in no state to be called: the layer by
            # itself computes, or says what is wrong.
            return None
        results = dict(zip(called, zip(every, versions, ys, strict=True), strict=True))
        *_, y = results.pop(id(layer))
        _thread.held = _Held(self, x, modes, results)
        return y

    def _siblings(self, layer: Groupable) -> list[Groupable]:
        layers = self.layers()
        siblings = [other for other in layers if other is not layer]
        if len(siblings) < len(layers):
            return siblings
        # No layer of this group: one of its copy, which joins; a replica or a shallow copy does not.
        if self._open and "_is_replica" not in layer.__dict__:
            self._layers.append(weakref.ref(layer))
        return []

    def part(self, untaken: set[int]) -> None:
        """Divides the group: layers with these ids, and the others."""
        with _lock:
            layers = [layer for layer in self.layers() if layer.__dict__.get(GROUP) is self]
            left = [layer for layer in layers if id(layer) in untaken]
            if not left:
                return
            stay = [layer for layer in layers if id(layer) not in untaken]
            for layers in (stay, left):
                if layers:
                    Group(layers, _APART)


_APART = "its siblings were not called with the tensor that it was called with"


class _Held:
    """What a group's call computed for layers that are yet to be called."""

    __slots__ = ("__weakref__", "group", "modes", "results", "version", "x")

    def __init__(
        self,
        group: Group,
        x: Tensor,
        modes: tuple[Any, ...],
        results: dict[int, tuple[Operands, list[int], Tensor]],
    ) -> None:
        self.group = group
        self.modes = modes
        self.results = results
        self.version = x._version
        self.x = weakref.ref(x, partial(_forget, weakref.ref(self)))

    def are_of(self, group: Group, x: Tensor) -> bool:
        return self.group is group and self.x() is x and self.version == x._version

    def take(self, layer: Groupable, x: Tensor, operands: Operands) -> Tensor | None:
        """The layer's output, once; None where it was not computed from what the layer is called with now."""
        entry = self.results.get(id(layer))
        if entry is None:
            return None
        computed, versions, y = entry
        same = all(
            now is then or (not isinstance(now, Tensor) and now == then)
            for now, then in zip(operands, computed, strict=True)
        )
        if not same or versions != _versions(operands):
            return None
        if self.modes != _modes(x.device) or not _quiet(layer):
            return None
        del self.results[id(layer)]
        if not self.results:
            _thread.held = None
        return y

    def conclude(self) -> None:
        untaken = set(self.results)
        self.results = {}
        if untaken:
            self.group.part(untaken)


class _Thread(threading.local):
    held: _Held | None = None


_thread = _Thread()
_lock = threading.RLock()
_asked = "auto"


def conclude() -> None:
    """Drops what this thread holds, and parts layers whose result was not taken."""
    held, _thread.held = _thread.held, None
    if held is not None:
        held.conclude()


def _forget(held: weakref.ref[_Held], _x: weakref.ref[Tensor]) -> None:
    """The tensor is no more: nobody can be called with it."""
    of = held()
    if of is not None:
        of.conclude()


@contextmanager
def use_groups(mode: str) -> Iterator[None]:
    """Within this context layers that share an input are computed together always, never, or where it pays
    ("auto"); in every thread."""
    global _asked
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    before, _asked = _asked, mode
    try:
        yield
    finally:
        _asked = before


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module may do more than its class's forward."""
    # By attribute: torch.compile, which takes hooks as they are when it traces, guards on none of these then.
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _quiet(layer: Groupable) -> bool:
    """Whether calling the layer runs its forward and nothing else."""
    return not has_hooks(cast(nn.Module, layer))


def _may_lead(layer: Groupable, x: Tensor, operands: Operands) -> bool:
    """Whether the layer's call may compute siblings' outputs."""
    return (
        # Each layer draws its mask when it is called, as ever.
        operands.dropout_p == 0.0
        and type(x) is Tensor
        # Without a version counter a change between two calls goes unseen.
        and not x.is_inference()
        # Checkpoints and offloading count what is saved, call by call.
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and _quiet(layer)
        and not nn_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        and paths.choose(x.device.type, x.device.index) != "reference"
    )


def _operands_beside(sibling: Groupable, layer: Groupable, operands: Operands) -> Operands | None:
    """The sibling's operands, where one call may compute both layers."""
    if type(sibling) is not type(layer) or not _quiet(sibling):
        return None
    own = sibling.operands()
    if own is None or own.dropout_p != 0.0:
        return None
    fits = (
        own.weight.dtype == operands.weight.dtype
        and own.lora_a.dtype == operands.lora_a.dtype
        and own.lora_a.device == operands.lora_a.device
        and own.lora_a.shape[1] == operands.lora_a.shape[1]
    )
    return own if fits else None


def _versions(operands: Operands) -> list[int]:
    """Raises RuntimeError for tensors made in inference mode, which have none."""
    bias = operands.bias
    versions = [operands.weight._version, operands.lora_a._version, operands.lora_b._version]
    return versions if bias is None else [*versions, bias._version]


def _modes(device: torch.device) -> tuple[Any, ...]:
    """Of torch's modes those under which the same operands may give another result, or be seen by another."""
    kind = device.type
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        kind == "cuda" and torch._C._cuda_getCurrentRawStream(device.index),
        paths.asked(),
    )
