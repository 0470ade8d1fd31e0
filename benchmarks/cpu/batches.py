"""The sides of what more than one adapter or layer computes at a time.

A mixed batch: neighbouring rows belong to one of several adapters, in evaluation. PEFT's side is its
`adapter_names`, a loop over the adapters.

Layers of one x: q, k and v, forward and backward, their gradients of x summed. Ours are grouped, and computed
as `auto` does, always together, or always apart.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.cpu.cases import ADAPTERS, MIXED, ROWS_OF_ADAPTER, SHARED, SHARED_OUT, Case
from benchmarks.cpu.sides import APART, AUTO, FROZEN, PACKED, PEFT, SCALING, TOGETHER, Sides
from benchmarks.cpu.turns import Side

SIDES = {MIXED: (FROZEN, PEFT, AUTO, PACKED), SHARED: (FROZEN, PEFT, AUTO, TOGETHER, APART)}
NAMES = [f"adapter{i}" for i in range(ADAPTERS)]
OF_ROW = [name for name in NAMES for _ in range(ROWS_OF_ADAPTER)]
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def build(case: Case, wanted: Sequence[str]) -> Sides:
    """The sides of a case, called once each."""
    make = _mixed if case.half == MIXED else _shared
    made = Sides({})
    for name in wanted:
        try:
            side = make(name, case)
            with side.context():
                side.call()
        except Exception as error:  # of many kinds: the allocator's, a path's refusal
            made.absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            made.running[name] = side
    return made


def _mixed(name: str, case: Case) -> Side:
    model, x = (
        _base(case, {"o_proj": case.layer.out_features}),
        _draw(case, case.rows, case.layer.in_features),
    )
    if name == FROZEN:
        return Side(functools.partial(model.o_proj, x), torch.no_grad)
    if name == PEFT:
        layer = _pefts(model, case, NAMES).o_proj
        return Side(functools.partial(layer, x, adapter_names=OF_ROW), torch.no_grad)
    _ours(model, case, NAMES)
    if name == PACKED:
        report = fused_lora.pack(model)
        if not report.packed:
            raise ValueError(f"left plain: {report.left_plain[0].reason}")

    @contextmanager
    def context() -> Iterator[None]:
        with torch.no_grad(), fused_lora.use_adapters(model, OF_ROW):
            yield

    return Side(functools.partial(model.o_proj, x), context)


def _shared(name: str, case: Case) -> Side:
    model = _base(case, dict(zip(PROJECTIONS, SHARED_OUT, strict=True)))
    x = _draw(case, case.rows, case.layer.in_features).requires_grad_()
    dys = [_draw(case, case.rows, out_features) for out_features in SHARED_OUT]
    if name == PEFT:
        model = _pefts(model, case, NAMES[:1])
    elif name != FROZEN:
        _ours(model, case, NAMES[:1])
    model.train()
    layers = [getattr(model, projection) for projection in PROJECTIONS]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def call() -> object:
        computed = x.view_as(x)  # as by a layer before; auto leaves leaves alone
        return torch.autograd.grad([layer(computed) for layer in layers], wanted, dys)

    modes = {TOGETHER: "always", APART: "never"}
    return Side(call, functools.partial(fused_lora.use_groups, modes[name]) if name in modes else nullcontext)


def _draw(case: Case, *shape: int, key: str = "") -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(*shape, generator=generator).to(getattr(torch, case.dtype))


def _base(case: Case, out_features: dict[str, int]) -> Any:
    """The frozen layers, of the same weights for every side."""
    model = _Projections()
    for name, n in out_features.items():
        linear = nn.Linear(case.layer.in_features, n, bias=False, device="meta")
        weight = _draw(case, n, case.layer.in_features, key=name) * case.layer.in_features**-0.5
        linear.weight = nn.Parameter(weight, requires_grad=False)
        model.add_module(name, linear)
    return model.eval()


class _Projections(nn.Module):
    """Its attributes are layers of one attention."""


def _ours(model: Any, case: Case, names: Sequence[str]) -> None:
    for name in names:
        fused_lora.add_lora(
            model,
            "all",
            r=case.rank,
            alpha=SCALING * case.rank,
            adapter_name=name,
            dtype=getattr(torch, case.dtype),
        )
    _train(model, case)


def _pefts(model: Any, case: Case, names: Sequence[str]) -> Any:
    config = peft.LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, target_modules=list(model._modules))
    adapted = peft.get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    _train(adapted, case)
    return adapted.base_model.model.eval()


def _train(model: nn.Module, case: Case) -> None:
    """The same numbers into the adapters of every side, as training would leave them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            adapter = re.search(r"\w+\.lora_[AB]\.\w+", name)
            if adapter:
                drawn = _draw(case, *parameter.shape, key=adapter[0])
                parameter.copy_(drawn * parameter.shape[1] ** -0.5)
