"""The sides of a layer's case: the same weight, adapters and input, computed in different ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.cpu.cases import BOTH, DECODE_ROWS, Case
from benchmarks.cpu.formulations import Formulation, best_order
from benchmarks.cpu.memory import saved_bytes
from benchmarks.cpu.turns import Side

FROZEN = "frozen"
PEFT, PEFT_DEFAULT, PEFT_COMPILED = "PEFT", "PEFT default", "PEFT compiled"
ADDMM, RUNLORA = "addmm_", "RunLoRA"
COMPOSED, FUSED, AUTO = "composed", "fused", "auto"
MASTERS, PACKED = "auto, masters", "packed"
NO_DROPOUT, PEAK = "auto without dropout", "GEMM peak"
TOGETHER, APART = "auto, together", "auto, apart"

EXPLANATIONS = {
    FROZEN: "nn.Linear; its backward is dx alone",
    PEFT: "PEFT's layer, eager, adapters in the base's dtype",
    PEFT_DEFAULT: "PEFT as it comes: float32 adapters, under bfloat16 autocast",
    PEFT_COMPILED: "the same as PEFT under torch.compile, warm",
    ADDMM: "Unsloth's algebra, written out: low-rank products accumulated in place",
    RUNLORA: "RunLoRA's idea, written out: the orders of products with the fewest flops for the shape",
    COMPOSED: "ours: torch's GEMMs, called from C++",
    FUSED: "ours: our kernels",
    AUTO: "ours, as it comes: fused or composed, chosen at the first call",
    MASTERS: "auto with float32 adapters under bfloat16 autocast, as PEFT's default",
    PACKED: "auto, the frozen weight held packed",
    NO_DROPOUT: "auto on the same layer without dropout",
    TOGETHER: "auto, layers of one x by one call, where auto itself does so from 512 rows on",
    APART: "auto, layers of one x each by a call of its own",
    PEAK: "torch's fastest square GEMM, as the machine's peak",
}
SIDES = tuple(EXPLANATIONS)
OF_A_LAYER = tuple(name for name in SIDES if name not in (TOGETHER, APART))
PEFT_SIDES = (PEFT, PEFT_DEFAULT, PEFT_COMPILED)
SCALING = 2.0
# No cast is kept from call to call: A and B change with every step of a training.
_MASTERS_CONTEXT = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, cache_enabled=False)
_Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Sides:
    """What can run, by name; why others cannot; and what their forwards save, if there is a backward."""

    running: dict[str, Side]
    absent: dict[str, str] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)


class _Absent(Exception):
    """A side that has no meaning in a case, with the reason."""


def build(case: Case, wanted: Sequence[str] = OF_A_LAYER, peak: Side | None = None) -> Sides:
    """The sides of a case, called once each.

    A side whose first call fails (a path's refusal, no compiler for torch.compile, too little memory) is
    absent with the reason. peak: the GEMM that stands for the machine's peak.
    """
    dtype = getattr(torch, case.dtype)
    operands = _Operands(case, dtype)
    running: dict[str, Side] = {}
    absent: dict[str, str] = {}
    saved: dict[str, int] = {}
    for name in wanted:
        if name == PEAK:
            if peak is not None:
                running[name] = peak
            continue
        try:
            module, contexts, note = _make(name, case, operands)
            side = Side(_step(case, operands, module), _entered(case, contexts), note)
            with side.context():
                if case.half == BOTH:
                    known = [operands.x, operands.weight, *module.parameters()]
                    saved[name] = saved_bytes(side.call, known)
                else:
                    side.call()
            if name in (AUTO, PACKED):
                side.note = _choice(case, packed=name == PACKED)
        except _Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # of many kinds: the compiler's, the allocator's, a path's refusal
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            running[name] = side
    return Sides(running, absent, saved)


class _Operands:
    """x: M×K, weight: N×K, a: r×K, b: N×r, dy: M×N. Training needs gradients of x, a and b."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, columns: int, scale: float) -> Tensor:
            return torch.randn(rows, columns, generator=generator).mul_(scale).to(dtype)

        k, n, r = case.layer.in_features, case.layer.out_features, case.rank
        self.x = draw(case.rows, k, 1.0).requires_grad_(case.half == BOTH)
        self.dy = draw(case.rows, n, 1.0)
        self.weight = draw(n, k, k**-0.5)
        self.a, self.b = draw(r, k, k**-0.5), draw(n, r, r**-0.5)

    def linear(self, *, own: bool = False) -> nn.Linear:
        """The frozen layer; of the weight that all sides share, or of a copy."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        weight = self.weight.clone() if own else self.weight
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear


def _make(name: str, case: Case, operands: _Operands) -> tuple[nn.Module, list[_Context], str]:
    """A side's layer, what it runs in, and what is to be said of it."""
    dtype = operands.weight.dtype
    if name == FROZEN:
        return operands.linear(), [], ""
    if name in (PEFT_DEFAULT, MASTERS) and dtype == torch.float32:
        raise _Absent("bfloat16 autocast on a bfloat16 model; in float32 the default is PEFT")
    if name in (ADDMM, RUNLORA):
        if case.dropout:
            raise _Absent("has no dropout")
        sizes = case.rows, case.layer.in_features, case.layer.out_features, case.rank
        order = best_order(*sizes) if name == RUNLORA else None
        layer = Formulation(operands.weight, operands.a, operands.b, SCALING, order)
        return layer, [], str(order or "")
    if name == PEFT:
        return pefts(case, operands, dtype), [], ""
    if name == PEFT_DEFAULT:
        return pefts(case, operands, torch.float32), [_MASTERS_CONTEXT], ""
    if name == PEFT_COMPILED:
        return compiled(pefts(case, operands, dtype)), [], ""
    if name == NO_DROPOUT and not case.dropout:
        raise _Absent("the case has no dropout")
    if name == PACKED:
        if case.half == BOTH or case.rows > DECODE_ROWS:
            raise _Absent(f"for forwards of at most {DECODE_ROWS} rows")
        layer_ = ours(case, operands, dtype, own=True)
        report = fused_lora.pack(layer_)
        if not report.packed:
            raise _Absent(f"left plain: {report.left_plain[0].reason}")
        return layer_, [_path("auto")], ""
    if name == MASTERS:
        return ours(case, operands, torch.float32), [_path("auto"), _MASTERS_CONTEXT], ""
    layer_ = ours(case, operands, dtype, dropout=0.0 if name == NO_DROPOUT else case.dropout)
    return layer_, [_path(AUTO if name == NO_DROPOUT else name)], ""


def ours(
    case: Case,
    operands: _Operands,
    adapter_dtype: torch.dtype,
    *,
    dropout: float | None = None,
    own: bool = False,
) -> nn.Module:
    layer = fused_lora.LoRALinear.adopt(operands.linear(own=own))
    p = case.dropout if dropout is None else dropout
    settings = fused_lora.LoRASettings(case.rank, alpha=SCALING * case.rank, dropout=p)
    layer.add_adapter("default", settings, dtype=adapter_dtype)
    with torch.no_grad():
        layer.lora_A["default"].copy_(operands.a)
        layer.lora_B["default"].copy_(operands.b)
    return layer


def pefts(case: Case, operands: _Operands, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's own layer around the frozen one. float32 adapters are what PEFT makes by default."""
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=SCALING * case.rank,
        lora_dropout=case.dropout,
        target_modules=["0"],
    )
    wrapped = peft.get_peft_model(nn.Sequential(operands.linear()), config, autocast_adapter_dtype=False)
    layer: Any = wrapped.base_model.model[0]
    for linear, values in ((layer.lora_A["default"], operands.a), (layer.lora_B["default"], operands.b)):
        linear.weight.data = values.to(adapter_dtype, copy=True)
    module: nn.Module = layer
    return module


def compiled(layer: nn.Module) -> nn.Module:
    torch._dynamo.reset()  # one shape's graph would count against the next one's limit of recompilations
    layer.compile(fullgraph=True)
    return layer


def _path(name: str) -> _Context:
    return functools.partial(fused_lora.use_path, name)


def _entered(case: Case, contexts: Sequence[_Context]) -> _Context:
    needed = [*contexts, *([] if case.half == BOTH else [torch.no_grad])]

    @contextmanager
    def entered():  # type: ignore[no-untyped-def]
        with ExitStack() as stack:
            for context in needed:
                stack.enter_context(context())
            yield

    return entered


def _step(case: Case, operands: _Operands, module: nn.Module) -> Callable[[], object]:
    """A forward in training mode, or that and the gradients of x and of what trains."""
    x, dy = operands.x, operands.dy
    if case.half != BOTH:
        return functools.partial(module, x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> object:
        return torch.autograd.grad(module(x), wanted, dy)

    return step


def _choice(case: Case, *, packed: bool) -> str:
    """The paths that auto took in a call."""
    said = fused_lora.explain(
        "cpu",
        rows=case.rows,
        in_features=case.layer.in_features,
        out_features=case.layer.out_features,
        rank=case.rank,
        dtype=getattr(torch, case.dtype),
        adapter_dtype=getattr(torch, case.dtype),
        dropout=case.dropout > 0,
        weight_packed=packed,
    )
    chosen = (line.strip().split(": ") for line in said.splitlines() if line.startswith("  "))
    halves = ("forward",) if case.half != BOTH else ("forward", "backward")
    return ", ".join(f"{half} {path}" for half, path, *_ in chosen if half in halves)
