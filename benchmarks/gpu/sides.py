"""The layers that are compared: the same weights, the same input, a training step or a forward of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import peft
import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.shapes import Shape

Step = Callable[[], object]

FROZEN, FUSED, COMPOSED = "frozen linear", "fused", "composed"
FUSED_MASTERS = "fused, float32 A and B, autocast"
PEFT, PEFT_COMPILED = "PEFT", "PEFT compiled"
PEFT_MASTERS = "PEFT's default: float32 A and B, autocast"
SIDES = (FROZEN, FUSED, COMPOSED, FUSED_MASTERS, PEFT, PEFT_COMPILED, PEFT_MASTERS)


@dataclass(frozen=True)
class Sides:
    """What can run, by name, and why the others cannot."""

    steps: dict[str, Step]
    missing: dict[str, str] = field(default_factory=dict)


def build(
    shape: Shape, dtype: torch.dtype, dropout: float, device: torch.device | str, *, backward: bool
) -> Sides:
    """Each side's step: with `backward` a forward in training and its gradients, else a forward without any.

    A side whose first call fails (no CUDA kernels in this build, no compiler for torch.compile, too little
    memory) is left out with the reason.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    frozen = nn.Linear(shape.in_features, shape.out_features, bias=False, device=device, dtype=dtype)
    frozen.requires_grad_(False)
    x = torch.randn(shape.rows, shape.in_features, device=device, dtype=dtype, requires_grad=backward)
    dy = torch.randn(shape.rows, shape.out_features, device=device, dtype=dtype)

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=dtype)

    def path(name: str) -> Callable[[], AbstractContextManager[object]]:
        return lambda: fused_lora.use_path(name)

    with_dropout = dropout if backward else 0.0
    makers: dict[str, Callable[[], tuple[nn.Module, list[Callable[[], AbstractContextManager[object]]]]]] = {
        FROZEN: lambda: (frozen, []),
        FUSED: lambda: (ours(frozen, shape, with_dropout, dtype), [path("fused")]),
        COMPOSED: lambda: (ours(frozen, shape, with_dropout, dtype), [path("composed")]),
        FUSED_MASTERS: lambda: (
            ours(frozen, shape, with_dropout, torch.float32),
            [path("fused"), autocast],
        ),
        PEFT: lambda: (pefts(frozen, shape, with_dropout, dtype), []),
        PEFT_COMPILED: lambda: (_compiled(pefts(frozen, shape, with_dropout, dtype)), []),
        PEFT_MASTERS: lambda: (pefts(frozen, shape, with_dropout, torch.float32), [autocast]),
    }
    if dtype == torch.float32:  # then autocast and masters have nothing to do
        del makers[FUSED_MASTERS], makers[PEFT_MASTERS]
    steps, missing = {}, {}
    for name, make in makers.items():
        try:
            module, contexts = make()
            step = _step(module, x, dy, contexts, backward)
            step()
        except Exception as error:  # of many kinds: the compiler's, the allocator's, a path's refusal
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[name] = step
    return Sides(steps, missing)


def ours(frozen: nn.Linear, shape: Shape, dropout: float, adapter_dtype: torch.dtype) -> nn.Module:
    layer = fused_lora.LoRALinear.from_linear(frozen)
    settings = fused_lora.LoRASettings(shape.rank, alpha=float(shape.rank), dropout=dropout)
    layer.add_adapter("default", settings, dtype=adapter_dtype)
    nn.init.normal_(layer.lora_B["default"], std=0.02)
    return layer


def pefts(frozen: nn.Linear, shape: Shape, dropout: float, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's own layer around the frozen one. float32 adapters are what PEFT makes by default."""
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank,
        lora_dropout=dropout,
        target_modules=["0"],
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(nn.Sequential(frozen), config, autocast_adapter_dtype=False)
    layer: nn.Module = wrapped.base_model.model[0]
    for parameter in (p for p in layer.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(adapter_dtype)
    return layer


def _compiled(layer: nn.Module) -> nn.Module:
    torch._dynamo.reset()  # one shape's graph would count against the next one's limit of recompilations
    layer.compile(fullgraph=True)
    return layer


def _step(
    module: nn.Module,
    x: Tensor,
    dy: Tensor,
    contexts: list[Callable[[], AbstractContextManager[object]]],
    backward: bool,
) -> Step:
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    def step() -> object:
        with entered(), nullcontext() if backward else torch.no_grad():
            y = module(x)
            return torch.autograd.grad(y, wanted, dy) if backward else y

    return step
