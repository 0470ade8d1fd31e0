"""Operands of the op, and the rule by which its results are judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_lora import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (x, W and b; A and B)
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
GRADIENTS = ("x", "weight", "lora_a", "lora_b", "bias")


@dataclass
class Operands:
    """x: …×in, weight: out×in, lora_a: r×in, lora_b: out×r, bias: out, at the scale of a trained layer."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Any, Any, Any, Any, Any]:
        return self.x, self.weight, self.lora_a, self.lora_b, self.bias

    def to(self, device: torch.device | str) -> Operands:
        """The same numbers on another device, the seed among them."""
        x, weight, lora_a, lora_b = (t.to(device) for t in self.tensors[:4])
        bias = None if self.bias is None else self.bias.to(device)
        options = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in self.options.items()}
        return Operands(x, weight, lora_a, lora_b, bias, options)

    def double(self) -> Operands:
        x, weight, lora_a, lora_b = (t.detach().double() for t in self.tensors[:4])
        bias = None if self.bias is None else self.bias.detach().double()
        return replace(self, x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias)

    def squared(self) -> Operands:
        """In float64. What the op makes of them is sums of the squares of its terms."""
        exact = self.double()
        x, weight, lora_a, lora_b = (t.square() for t in exact.tensors[:4])
        bias = None if exact.bias is None else exact.bias.square()
        options = {**self.options, "scaling": self.options["scaling"] ** 2}
        return Operands(x, weight, lora_a, lora_b, bias, options)


def operands(
    lead: tuple[int, ...] = (5,),
    in_features: int = 24,
    out_features: int = 16,
    rank: int = 4,
    dtype: torch.dtype = F32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout_p: float = 0.0,
    scaling: float = 1.5,
    key: int = 0,
) -> Operands:
    generator = torch.Generator().manual_seed(key)

    def draw(*shape: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    options: dict[str, Any] = {"scaling": scaling, "dropout_p": dropout_p}
    if dropout_p > 0:
        options["seed"] = torch.tensor([key + 77])
    return Operands(
        draw(*lead, in_features, scale=1.0, dtype=dtype),
        draw(out_features, in_features, scale=in_features**-0.5, dtype=dtype),
        draw(rank, in_features, scale=in_features**-0.5, dtype=adapter_dtype),
        draw(out_features, rank, scale=rank**-0.5, dtype=adapter_dtype),
        draw(out_features, scale=0.5, dtype=dtype) if bias else None,
        options,
    )


def torch_sequence(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """The unfused op sequence in the operands' own dtypes, as PEFT runs it, with our mask for its dropout."""
    y = torch.nn.functional.linear(x, weight, bias)
    x_hat = x.to(lora_a.dtype)
    if dropout_p:
        assert seed is not None
        mask = reference.dropout_mask(seed, x[..., 0].numel(), x.shape[-1], dropout_p).reshape(x.shape)
        x_hat = x_hat * (mask * reference.dropout_rule(dropout_p)[1]).to(x_hat.dtype)
    return (y + x_hat @ lora_a.t() @ lora_b.t() * scaling).to(y.dtype)


def exact_dy(y: Tensor) -> Tensor:
    """Numbers that every dtype holds exactly, so that all sides are given the same dy."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(BF16)


def forward_and_backward(op, given: Operands, needs=("x", "lora_a", "lora_b"), dy: Tensor | None = None):
    """(y, {name: gradient}) of `op` on fresh leaves made of the operands."""
    leaves: dict[str, Any] = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in needs)
        for name, tensor in zip(GRADIENTS, given.tensors, strict=True)
    }
    y = op(*leaves.values(), **given.options)
    if dy is None:
        dy = exact_dy(y)
    wanted = [leaves[name] for name in needs]
    gradients = torch.autograd.grad(y, wanted, dy.to(y.device, y.dtype)) if wanted else ()
    return y.detach(), dict(zip(needs, gradients, strict=True))


def assert_no_worse_than_torch(
    ours: Tensor, torch_own: Tensor, exact: Tensor, what: str, terms: Tensor | None = None
) -> None:
    """Our error against float64 is at most twice that of torch's own sequence in the same dtype, beside
    what merely rounding the exact result to that dtype may cost.

    terms: for each element the root of the sum of its terms' squares. In a few elements torch's own error may
    be next to nothing by luck: there some roundings in float32 at the terms' size are allowed as well.
    """
    assert ours.shape == exact.shape, what
    assert ours.dtype == torch_own.dtype, what
    if exact.numel() == 0:
        return
    if ours.dtype == F64:  # nothing wider to measure with
        torch.testing.assert_close(ours, exact, msg=lambda text: f"{what}: {text}")
        return
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max()
    allowed = 2 * (torch_own.double() - exact).abs().max() + 2 * rounding
    luck = 4 * torch.finfo(F32).eps if terms is not None and exact.numel() < 64 else 0.0
    if terms is not None:
        allowed += luck * terms.max()
    error = (ours.double() - exact).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
    # A gradient may be small everywhere but where it matters: compare the whole as well.
    norm = exact.norm()
    if norm > 0:
        relative = (ours.double() - exact).norm() / norm
        bound = 2 * (torch_own.double() - exact).norm() / norm + 2 * torch.finfo(ours.dtype).eps
        if terms is not None:
            bound += luck * terms.norm() / norm
        assert relative <= bound, f"{what}: relative L2 error {relative:.3g}, allowed {bound:.3g}"
        cosine = torch.nn.functional.cosine_similarity(ours.double().flatten(), exact.flatten(), dim=0)
        assert cosine > 1 - 1e-3, f"{what}: cosine {cosine}"


def check_against_torch(
    given: Operands, op, needs=("x", "lora_a", "lora_b"), sequence=torch_sequence
) -> None:
    """Forward and the needed gradients of `op` under the rule above."""
    ours = forward_and_backward(op, given, needs)
    own = forward_and_backward(sequence, given, needs)
    exact = forward_and_backward(torch_sequence, given.double(), needs)
    squares = forward_and_backward(torch_sequence, given.squared(), needs, exact_dy(exact[0]).square())
    assert_no_worse_than_torch(ours[0], own[0], exact[0], "y", squares[0].sqrt())
    for name in needs:
        what = f"gradient of {name}"
        terms = squares[1][name].sqrt()
        assert_no_worse_than_torch(ours[1][name], own[1][name], exact[1][name], what, terms)
