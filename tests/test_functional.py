"""torch.func and forward-mode derivatives: whatever torch's own linear does under a transform."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional as F

import fused_lora
from fused_lora import LoRALinear, dropout_mask, lora_linear
from tests.operands import BF16, F32, F64, operands


def adapted(dropout=0.0, dtype=F64):
    torch.manual_seed(0)
    layer = LoRALinear(6, 5, r=2, dropout=dropout, dtype=dtype)
    nn.init.normal_(layer.lora_B["default"])
    return layer.requires_grad_()


class Unfused(nn.Module):
    """A LoRALinear's Parameters, by torch's own linear."""

    def __init__(self, layer):
        super().__init__()
        self.inner = copy.deepcopy(layer)

    def forward(self, x):
        inner = self.inner
        h = F.linear(x, inner.lora_A["default"])
        scaling = inner.settings["default"].scaling
        return F.linear(x, inner.weight, inner.bias) + scaling * F.linear(h, inner.lora_B["default"])


def loss(layer, parameters, x):
    return functional_call(layer, parameters, (x,)).square().sum()


X = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
DY = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(2))
TRANSFORMS = {
    "functional_call": lambda layer, p: functional_call(layer, p, (X,)),
    "grad of parameters": lambda layer, p: list(grad(lambda p: loss(layer, p, X))(p).values()),
    "grad of x": lambda layer, p: grad(lambda x: layer(x).square().sum())(X),
    "vjp": lambda layer, p: vjp(layer, X)[1](DY),
    "jvp": lambda layer, p: jvp(layer, (X,), (X.cos(),)),
    "jvp of parameters": lambda layer, p: jvp(lambda p: loss(layer, p, X), (p,), (p,)),
    "linearize": lambda layer, p: linearize(layer, X)[1](X.cos()),
    "jacrev": lambda layer, p: jacrev(layer)(X),
    "jacfwd": lambda layer, p: jacfwd(layer)(X),
    "hessian": lambda layer, p: hessian(lambda x: layer(x).square().sum())(X),
    "vmap of x": lambda layer, p: vmap(layer)(X),
    "vmap of columns": lambda layer, p: vmap(layer, in_dims=1, out_dims=1)(X.t()),
    "vmap of parameters": lambda layer, p: vmap(lambda p: functional_call(layer, p, (X,)))(
        {name: torch.stack([value, 2 * value]) for name, value in p.items()}
    ),
    "a gradient for each row": lambda layer, p: list(
        vmap(grad(lambda p, x: loss(layer, p, x)), in_dims=(None, 0))(p, X).values()
    ),
    "a batch of backwards": lambda layer, p: torch.autograd.functional.jacobian(layer, X, vectorize=True),
    "forward-mode derivative": lambda layer, p: torch.autograd.functional.jacobian(
        layer, X, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_transform_gives_what_it_gives_of_torchs_own_linear(transform):
    layer = adapted()
    unfused = Unfused(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # linearize's own
        got = transform(layer, dict(layer.named_parameters()))
        expected = transform(unfused, dict(unfused.named_parameters()))
    torch.testing.assert_close(got, expected)


def test_torch_ops_is_transformed_as_well():
    given = operands(dtype=F64)

    def total(a):
        return torch.ops.fused_lora.lora_linear(given.x, given.weight, a, given.lora_b, given.bias).sum()

    a = given.lora_a.requires_grad_()
    torch.testing.assert_close(grad(total)(a), torch.autograd.grad(total(a), a)[0])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("autocast", [False, True])
def test_masters_and_autocast_mean_the_same_under_a_transform(dtype, adapter_dtype, autocast):
    given = operands((40,), dtype=F32 if autocast else dtype, adapter_dtype=adapter_dtype)

    def total(a):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            return lora_linear(given.x, given.weight, a, given.lora_b, given.bias).float().square().sum()

    a = (given.lora_a.float() if autocast else given.lora_a).requires_grad_()
    given.lora_b = given.lora_b.to(a.dtype)
    got, expected = grad(total)(a), torch.autograd.grad(total(a), a)[0]
    assert got.dtype == expected.dtype
    assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_drops_what_the_mask_says_under_a_transform(packed):
    given = operands((9,), 64, 64, 4, F32, dropout_p=0.3)
    weight = torch.ops.fused_lora.pack_weight(given.weight) if packed else given.weight

    def op(x):
        return lora_linear(x, weight, given.lora_a, given.lora_b, given.bias, **given.options)

    given.x.requires_grad_()
    y = op(given.x)
    (dx,) = torch.autograd.grad(y.sum(), given.x)
    torch.testing.assert_close(grad(lambda x: op(x).sum())(given.x), dx)
    torch.testing.assert_close(jvp(op, (given.x,), (torch.ones_like(given.x),))[0], y)


def test_vmap_draws_masks_as_it_is_told_to(recwarn, capfd):
    layer = adapted(dropout=0.5)
    x = X[:1].expand(8, 6)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    same = vmap(layer, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    assert len(vmap(layer, randomness="different")(x).unique(dim=0)) > 1
    seeds = torch.arange(3)
    masks = vmap(lambda seed: dropout_mask(seed, 4, 9, 0.5))(seeds)
    assert torch.equal(masks, torch.stack([dropout_mask(int(seed), 4, 9, 0.5) for seed in seeds]))
    assert not recwarn.list
    assert "performance drop" not in capfd.readouterr().err


def test_bad_input_is_refused_under_a_transform_too():
    given = operands()
    with pytest.raises(ValueError, match="lora_a must have in_features"):
        grad(lambda x: lora_linear(x, given.weight, given.lora_a[:, 1:], given.lora_b).sum())(given.x)


def test_fused_asked_for_by_name_is_refused_under_a_transform():
    given = operands()

    def call(x):
        return lora_linear(x, *given.tensors[1:])

    with fused_lora.use_path("fused"):
        for transformed in (grad(lambda x: call(x).sum()), vmap(call), lambda x: jvp(call, (x,), (x,))):
            with pytest.raises(RuntimeError, match="path 'fused' was asked for, but"):
                transformed(given.x)


def test_a_full_graph_of_a_transform_of_any_number_of_rows():
    layer = adapted()
    parameters = dict(layer.named_parameters())

    def step(p, x):
        return grad(lambda p: loss(layer, p, x))(p), vmap(lambda row: layer(row))(x)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (X, X[:3]):
        torch.testing.assert_close(compiled(parameters, x), step(parameters, x))
