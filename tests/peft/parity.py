"""A PEFT model and its fused twin, and what must be the same of the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fused_lora import dropout_mask, fuse
from tests.models import example, output, shake, tiny
from tests.operands import BF16, F32

TARGETS = {"llama": ["o_proj", "down_proj"], "gpt2": ["attn.c_proj", "mlp.c_proj"]}
BATCH = example("llama", rows=3)
# Products of up to 64 terms, a few of them one after another: at most so many roundings of the largest value.
ROUNDINGS = 1000


def adapted(family: str = "llama", dtype: torch.dtype = F32, key: int = 1, **settings: Any) -> Any:
    """A plain PEFT model whose adapter has been trained, so to say."""
    config = {"r": 4, "target_modules": TARGETS[family], "lora_alpha": 6, **settings}
    if family == "gpt2":
        config["fan_in_fan_out"] = True
    model = get_peft_model(tiny(family, dtype), LoraConfig(task_type="CAUSAL_LM", **config))
    shake(model, key)
    return model.eval()


class Net(nn.Module):
    """Every kind of base layer: with a bias, transposed as Conv1D's, and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.proj, self.head = nn.Linear(32, 48), Conv1D(32, 48), nn.Linear(32, 32, bias=False)
        nn.init.normal_(self.proj.weight, std=48**-0.5)
        nn.init.normal_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.proj(nn.functional.gelu(self.up(x))))
        return y


def adapted_net(dtype: torch.dtype = F32, key: int = 1, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["up", "proj", "head"], "lora_alpha": 6, **settings}
    model = get_peft_model(Net().to(dtype), LoraConfig(**config))
    shake(model, key)
    return model.eval()


def fused_twin(plain: Any) -> Any:
    fused = copy.deepcopy(plain)
    fuse(fused)
    return fused


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def inputs(*lead: int, dtype: torch.dtype = F32) -> Tensor:
    """Of a Net."""
    return torch.randn(*lead, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def output_and_gradients(model: Any, batch: dict[str, Tensor] | Tensor, **call: Any) -> dict[str, Tensor]:
    """What a forward and a backward give: the output, and gradients of x (a tensor) and of what trains."""
    model.zero_grad()
    if isinstance(batch, Tensor):
        x = batch.detach().requires_grad_()
        y = model(x, **call)
    else:
        x, y = None, output(model, {**batch, **call})
    if y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(BF16)
        torch.autograd.backward(y, dy.to(y.dtype))
    found = {"output": y.detach()}
    if x is not None and x.grad is not None:
        found["x"] = x.grad
    return {**found, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], roundings: float = ROUNDINGS) -> None:
    """The same names, dtypes and shapes in the same order, and values that differ by float32's rounding."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        if value.numel():
            value = as_numbers(value)
            difference = (as_numbers(ours[name]) - value).abs().max()
            allowed = roundings * torch.finfo(value.dtype).eps * value.abs().max()
            assert difference <= allowed, f"{name}: {difference:.3g} apart, allowed {allowed:.3g}"


def as_numbers(tensor: Tensor) -> Tensor:
    """What a tensor holds, in a plain one of a floating-point dtype."""
    if type(tensor).__module__.startswith("torchao"):
        tensor = tensor.dequantize()
    tensor = tensor.as_subclass(Tensor)
    return tensor if tensor.is_floating_point() else tensor.double()


class Masked(nn.Module):
    """PEFT's dropout module, with the fused op's mask for the seed that the op would draw here."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
        mask = dropout_mask(seed, x[..., 0].numel(), x.shape[-1], self.p, dtype=x.dtype)
        kept = round((1 - self.p) * 65536) / 65536
        return x * mask.reshape(x.shape) / kept if kept else torch.zeros_like(x)


@contextmanager
def our_masks(plain: nn.Module, fused: nn.Module) -> Iterator[None]:
    """Within it `plain` drops by our masks wherever `fused` would; elsewhere both draw torch's own."""
    replaced = []
    for theirs, ours in zip(layers(plain), layers(fused), strict=True):
        if getattr(ours, "why_not_fused", lambda: "")() is not None:
            continue
        for name, dropout in theirs.lora_dropout.items():
            if type(dropout) is nn.Dropout:
                replaced.append((theirs.lora_dropout, name, dropout))
                theirs.lora_dropout[name] = Masked(dropout.p).train(dropout.training)
    try:
        yield
    finally:
        for modules, name, dropout in replaced:
            modules[name] = dropout


def same(
    plain: Any,
    fused: Any,
    batch: dict[str, Tensor] | Tensor,
    autocast: torch.dtype | None = None,
    in_double: Callable[[Any], Any] = lambda model: copy.deepcopy(model).double(),
    **call: Any,
) -> None:
    """All that a user sees of the two: what trains, what is saved, and what a step computes.

    float32 and float64 by rounding; 16 bits, and autocast, by our error against float64, which may be
    three times PEFT's: twice is the rule for one op, and here what layers before have rounded is passed on.
    """
    assert trains(fused) == trains(plain)
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()), roundings=ROUNDINGS)
    assert fused.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    with our_masks(plain, fused):
        theirs, ours = (results(model, batch, autocast, **call) for model in (plain, fused))
    if autocast is None and theirs["output"].dtype in (torch.float32, torch.float64):
        assert_same(ours, theirs)
        return
    exact = in_double(plain)
    with our_masks(exact, fused):
        reference = results(exact, batch.double() if isinstance(batch, Tensor) else batch, None, **call)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_no_less_exact(ours[name], value, reference[name], name)


def assert_no_less_exact(ours: Tensor, theirs: Tensor, exact: Tensor, what: str) -> None:
    """In the norm: behind several layers the error of a single element is a matter of luck."""
    assert ours.dtype == theirs.dtype, what
    error, their_error = ((side.double() - exact).norm() for side in (ours, theirs))
    allowed = 3 * their_error + torch.finfo(ours.dtype).eps * exact.norm()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def results(
    model: Any, batch: dict[str, Tensor] | Tensor, autocast: torch.dtype | None, **call: Any
) -> dict[str, Tensor]:
    torch.manual_seed(9)
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        return output_and_gradients(model, batch, **call)


def trains(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
