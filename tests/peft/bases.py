"""Base layers that compute by themselves: of libraries that quantise, and stand-ins for others."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.models import shake
from tests.operands import F32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

# It warns at every call that is not in float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Quantised(nn.Linear):
    """Stands for the linears of quantising libraries: the weight is integers and a scale."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = float(self.weight.detach().abs().max()) / 127
        integers = (self.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


class QuantisedTensor(Tensor):
    """Stands for their tensors: a plain linear's weight that is more than its numbers. A linear
    makes plain ones of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs)
        return made.as_subclass(Tensor) if func is nn.functional.linear else made

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedTensor:
        copied = self.detach().as_subclass(Tensor).clone().as_subclass(QuantisedTensor)
        copied.requires_grad_(self.requires_grad)
        return copied


def quantised_tensor(dtype: torch.dtype = F32) -> nn.Module:
    linear = nn.Linear(64, 32, dtype=dtype)
    weight = linear.weight.detach().as_subclass(QuantisedTensor)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def bitsandbytes(bits: int, in_features: int = 64, out_features: int = 32) -> nn.Module:
    linear = nn.Linear(in_features, out_features)
    if bits == 4:
        layer = bnb.nn.Linear4bit(in_features, out_features, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    quantised: nn.Module = layer.to("cpu")
    return quantised


def torchao(
    config: Any, dtype: torch.dtype = F32, in_features: int = 64, out_features: int = 32
) -> nn.Module:
    held = nn.Sequential(nn.Linear(in_features, out_features).to(dtype))
    quantize_(held, config)
    layer: nn.Module = held[0]
    return layer


# Of 64→32, for x of a dtype.
BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "bitsandbytes, 4 bits": lambda dtype: bitsandbytes(4),
    "bitsandbytes, 8 bits": lambda dtype: bitsandbytes(8),
    "torchao, 8-bit weights": lambda dtype: torchao(Int8WeightOnlyConfig(), dtype),
    "torchao, 8-bit weights and x": lambda dtype: torchao(Int8DynamicActivationInt8WeightConfig(), dtype),
    "a module of one's own": lambda dtype: Quantised(64, 32).to(dtype),
    "a tensor of one's own": quantised_tensor,
}


class Net(nn.Module):
    """One such layer amid others, so that it gets an x that was computed and its y is computed on."""

    def __init__(self, base: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.before, self.base, self.after = (
            nn.Linear(64, 64, dtype=dtype),
            base,
            nn.Linear(32, 8, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(nn.functional.gelu(self.base(nn.functional.gelu(self.before(x)))))
        return y


def inputs(*lead: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*lead, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


class InItsDtype(nn.Module):
    """A base layer in a model of float64."""

    def __init__(self, base: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.dtype = base, dtype

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x.to(self.dtype))
        return y.double()


def in_double(model: Any) -> Any:
    """A copy in float64, all but the base layer, which computes as it did."""
    exact = copy.deepcopy(model)
    layer = exact.base_model.model.base
    dtype = exact.base_model.model.before.weight.dtype
    base, layer.base_layer = layer.base_layer, nn.Identity()
    exact.double()
    layer.base_layer = InItsDtype(base, dtype)
    return exact


def adapted(base: str, dtype: torch.dtype = F32, key: int = 1, **settings: Any) -> Any:
    """A PEFT model of a Net, the same at every call."""
    torch.manual_seed(0)
    net: Any = Net(BASES[base](dtype), dtype)
    # As transformers marks what it loads, which PEFT goes by.
    net.is_loaded_in_4bit = base == "bitsandbytes, 4 bits"
    net.is_loaded_in_8bit = base == "bitsandbytes, 8 bits"
    config = {"r": 4, "target_modules": ["base"], "lora_alpha": 6, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao's layers would not merge
        model = get_peft_model(net, LoraConfig(**config))
    shake(model, key)
    return model.eval()
