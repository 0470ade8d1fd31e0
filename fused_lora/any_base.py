"""Adapters of PEFT's over a base layer that computes by itself: its own forward, and `lora_add` on what that
gave."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_lora.adapter_sum import add_sum
from fused_lora.binary import BINARY
from fused_lora.grouped import has_hooks
from fused_lora.layer import PLAIN_LINEARS, is_plain_parameter, qualified
from fused_lora.packed import held_weight

if TYPE_CHECKING:
    from fused_lora.peft_layers import AdapterParts

# PEFT's layers that add adapters to what their base layer gives, by the modules they are in; and whether
# the sum has the base's dtype always, or under autocast that of torch's own addition.
KEEPS_DTYPE = {
    "peft.tuners.lora.layer.Linear": True,
    "peft.tuners.lora.torchao.TorchaoLoraLinear": True,
    "peft.tuners.lora.gptq.GPTQLoraLinear": True,
    "peft.tuners.lora.inc.IncLoraLinear": True,
    "peft.tuners.lora.te.TeLinear": True,
    "peft.tuners.lora.bnb.Linear4bit": False,
    "peft.tuners.lora.bnb.Linear8bitLt": False,
    "peft.tuners.lora.aqlm.AqlmLoraLinear": False,
    "peft.tuners.lora.awq.AwqLoraLinear": False,
    "peft.tuners.lora.eetq.EetqLoraLinear": False,
    "peft.tuners.lora.hqq.HqqLoraLinear": False,
}
# Linears that keep nothing of their output for backward and hand it to nobody else: the sum may take its
# place. Of another module nobody knows.
_GIVES_UP_OUTPUT = {
    *PLAIN_LINEARS,
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.LinearFP4",
    "bitsandbytes.nn.modules.LinearNF4",
    "bitsandbytes.nn.modules.Linear8bitLt",
}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)


def add_adapters(layer: Any, keeps_dtype: bool, x: Tensor, active: Sequence[AdapterParts]) -> Tensor:
    """The layer's output: what its base gives for x, and the sum of the adapters."""
    modules = layer._modules
    base = modules["quant_linear_module"] if "quant_linear_module" in modules else modules["base_layer"]
    y: Tensor = base(x)
    adapters = [parts.operands() for parts in active]
    a, b, *_ = adapters[0]
    x_cast = x
    # PEFT casts x to A's dtype, which float32 masters have no need of.
    if x.dtype != a.dtype and not (a.dtype == torch.float32 and x.dtype in _HALF):
        x_cast = layer._cast_input_dtype(x, a.dtype)
    if not _fit(layer, y, x_cast, a, b, keeps_dtype) or any(other.a.dtype != a.dtype for other in adapters):
        return _sum_of_modules(layer, y, x, keeps_dtype, active)
    in_place = _gives_up_output(base)
    if in_place and y._is_view():
        assert BINARY.module is not None
        y = BINARY.module.as_no_view(y)
    return with_biases(add_sum(y, x_cast, adapters, in_place=in_place), active)


def with_biases(y: Tensor, active: Sequence[AdapterParts]) -> Tensor:
    """y and the biases that adapters' B may have (lora_bias)."""
    biased = [parts for parts in active if parts.b._parameters["bias"] is not None]
    if not biased:
        return y
    total: Tensor = y + sum(parts.scaling * parts.b._parameters["bias"] for parts in biased)
    return total.to(y.dtype)


def _fit(layer: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, keeps_dtype: bool) -> bool:
    """Whether the op computes of these what PEFT would."""
    if not is_plain_parameter(type(y)) or not is_plain_parameter(type(x)):
        return False
    device, dtype = x.device, x.dtype
    may_cast = dtype != a.dtype or (not keeps_dtype and torch.is_autocast_enabled())
    if may_cast and not _casts_fit(layer, y.dtype, dtype, a.dtype, device.type, keeps_dtype):
        return False
    shape = x.shape
    return (
        y.dtype in _FLOATS
        and dtype in _FLOATS
        and y.layout is x.layout is torch.strided
        and y.device == device == a.device
        and len(shape) > 0
        and shape[-1] == a.shape[1]
        and y.shape == (*shape[:-1], b.shape[0])
    )


def _casts_fit(
    layer: Any, y: torch.dtype, x: torch.dtype, a: torch.dtype, kind: str, keeps_dtype: bool
) -> bool:
    """Whether the op rounds as PEFT's casts would. kind: of the device."""
    autocast = torch.is_autocast_enabled(kind)
    # Where PEFT casts x to float32, masters serve x as it is.
    if x != a and not autocast:
        cast = getattr(layer, "cast_input_dtype_enabled", True)
        if not (cast and a == torch.float32 and x in _HALF):
            return False
    if not keeps_dtype and torch.is_autocast_enabled():
        low = torch.get_autocast_dtype(kind) if autocast else a
        if torch.promote_types(y, low) != y:
            return False
    return True


def _sum_of_modules(
    layer: Any, y: Tensor, x: Tensor, keeps_dtype: bool, active: Sequence[AdapterParts]
) -> Tensor:
    """As PEFT adds it up, for whatever the base gave."""
    dtype = y.dtype
    converts = keeps_dtype or not torch.is_autocast_enabled()
    for parts in active:
        if converts:
            x = layer._cast_input_dtype(x, parts.a.weight.dtype)
        y = y + parts.b(parts.a(parts.dropout(x))) * parts.scaling
    return y.to(dtype) if converts else y


def _gives_up_output(base: nn.Module) -> bool:
    """Whether what the base gave may be overwritten."""
    # In a traced graph, and under torch.func's transforms, nothing is written in place.
    if torch.compiler.is_compiling():
        return False
    kind: Any = type(base)  # which mypy knows as no key
    may, is_plain = _known_of(kind)
    if not may or has_hooks(base) or BINARY.module is None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if not is_plain:
        return True
    weight = held_weight(base)
    return is_plain_parameter(type(weight)) or type(weight).__module__.partition(".")[0] == "torchao"


@functools.cache
def _known_of(kind: Any) -> tuple[bool, bool]:
    """Whether modules of a class may give up their output, and whether they are plain linears."""
    name = qualified(kind)
    return name in _GIVES_UP_OUTPUT, name in PLAIN_LINEARS
