"""lora_add and lora_add_, on what a frozen layer gave, against the unfused sequence and float64."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import explain, lora_add, lora_add_, reference, use_path
from fused_lora.paths import CPU_LEVELS
from tests import models
from tests.operands import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GRADIENTS,
    assert_no_worse_than_torch,
    check_against_torch,
    forward_and_backward,
    operands,
)
from tests.test_autocast import under_autocast
from tests.test_op import STRIDED
from tests.test_saved_memory import own_bytes, saved_tensors

steady = pytest.fixture(models.steady, autouse=True)
OPS = {"new": lora_add, "in place": lora_add_}


@pytest.fixture(params=list(OPS.values()), ids=list(OPS))
def op(request):
    return request.param


@pytest.fixture(params=["auto", "composed", "reference"])
def path(request):
    with use_path(request.param):
        yield request.param


def beside(op):
    """lora_linear, its frozen half by torch's own linear."""

    def call(x, weight, lora_a, lora_b, bias, **options):
        return op(F.linear(x, weight, bias), x, lora_a, lora_b, **options)

    return call


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_dtype_is_as_exact_as_torch(op, path, dtype, adapter_dtype, dropout_p):
    check_against_torch(operands((2, 33), 136, 72, 8, dtype, adapter_dtype, dropout_p=dropout_p), beside(op))


@pytest.fixture(params=CPU_LEVELS[1:])
def level(request):
    try:
        with fused_lora.use_cpu_level(request.param):
            yield request.param
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])


SHAPES = [
    *(((1,), 64, 64, 8), ((7,), 203, 113, 3), ((0,), 24, 16, 4), ((), 24, 16, 4), ((2, 0, 3), 24, 16, 4)),
    *(((2, 3), 1, 16, 1), ((2, 3, 4), 24, 1, 40), ((129,), 203, 256, 16), ((600,), 96, 576, 200)),
]


@pytest.mark.parametrize(("lead", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)])
def test_every_shape_is_as_exact_as_torch_at_every_level(
    level, lead, in_features, out_features, rank, dropout_p, dtype, adapter_dtype
):
    given = operands(lead, in_features, out_features, rank, dtype, adapter_dtype, dropout_p=dropout_p)
    with use_path("fused"):
        for op in OPS.values():
            check_against_torch(given, beside(op))


@pytest.mark.parametrize("needs", [(), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), GRADIENTS])
def test_gradients_go_to_what_needs_them(op, path, needs):
    check_against_torch(operands((3, 5), dropout_p=0.3), beside(op), needs)


# Of base; of x; of A and B.
MIXED = [(F32, BF16, BF16), (F32, BF16, F32), (BF16, F32, F32), (F32, F16, F32)]


@pytest.mark.parametrize(("base_dtype", "dtype", "adapter_dtype"), MIXED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_base_may_be_of_another_dtype_than_x(op, path, base_dtype, dtype, adapter_dtype, dropout_p):
    """The sum has base's dtype, and what goes back to x and the adapters theirs."""
    given = operands((21,), 72, 40, 8, dtype, adapter_dtype, dropout_p=dropout_p)
    base = torch.randn(21, 40, dtype=F64)

    def run(call, double=False):
        of = given.double() if double else given
        leaves = [base.to(F64 if double else base_dtype), of.x, of.lora_a, of.lora_b]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = call(leaves[0] * 1, *leaves[1:], **given.options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(BF16).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    names = ("y", "base", "x", "lora_a", "lora_b")
    own, exact = run(reference.lora_add), run(reference.lora_add, double=True)
    for name, ours, theirs, truth in zip(names, run(op), own, exact, strict=True):
        assert_no_worse_than_torch(ours, theirs, truth.to(ours.dtype).double(), name)


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_x_and_base(op, path, view):
    x = view(operands((10,), in_features=32).x)
    given = operands(in_features=x.shape[-1], out_features=x.shape[-1], dropout_p=0.3)
    base = view(torch.randn(10, 32))
    overlaps = "expand" if 0 in base.stride() else ""
    for one in (x, base) if not overlaps else (x,):
        own = base if one is base else torch.randn(x.shape)
        y = op(own.clone(memory_format=torch.preserve_format), x, given.lora_a, given.lora_b, **given.options)
        dense = lora_add(own.contiguous(), x.contiguous(), given.lora_a, given.lora_b, **given.options)
        torch.testing.assert_close(y, dense)
    if overlaps and op is lora_add_:
        with pytest.raises(RuntimeError, match="single memory location"):
            op(base, x, given.lora_a, given.lora_b, **given.options)


@pytest.mark.parametrize("dy", ["expanded", "transposed"])
def test_strided_dy(op, path, dy):
    given = operands((6,))
    value = torch.ones(()).expand(6, 16) if dy == "expanded" else torch.randn(16, 6).t()
    got = forward_and_backward(beside(op), given, dy=value)
    torch.testing.assert_close(got, forward_and_backward(beside(op), given, dy=value.contiguous()))


def test_a_part_of_the_columns_draws_its_part_of_the_mask(path):
    given = operands((5,), 40, dropout_p=0.4)
    base, (x, _, a, b, _) = torch.randn(5, 16), given.tensors
    parts = [slice(0, 16), slice(16, 40)]
    y = base
    for part in parts:
        y = lora_add(y, x[:, part], a[:, part], b, **given.options, column_offset=part.start)
    torch.testing.assert_close(y, lora_add(base, x, a, b, **given.options))


@pytest.mark.parametrize("autocast_dtype", [BF16, F16])
@pytest.mark.parametrize("base_dtype", [F32, "autocast"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_under_autocast_x_is_cast_and_base_stays(op, path, autocast_dtype, base_dtype, dropout_p):
    given = operands((65,), 136, 72, 8, F32, dropout_p=dropout_p)
    dtype = autocast_dtype if base_dtype == "autocast" else base_dtype
    seen = []

    def call(of, op, x, weight, lora_a, lora_b, bias, **options):
        with torch.autocast("cpu", enabled=False):
            base = F.linear(x, weight, bias).to(of)
        y = op(base, x, lora_a, lora_b, **options)
        seen.append(y.dtype)
        return y

    ours = under_autocast(lambda *t, **o: call(dtype, op, *t, **o), autocast_dtype)
    peft = under_autocast(lambda *t, **o: call(dtype, reference.lora_add, *t, **o), autocast_dtype)
    check_against_torch(given, ours, sequence=peft)
    assert set(seen) == {dtype}


# In place


def test_in_place_it_is_the_tensor_that_was_given(path):
    given = operands((3, 4))
    base = torch.randn(3, 4, 16)
    expected = lora_add(base, given.x, given.lora_a, given.lora_b, **given.options)
    version = base._version
    y = lora_add_(base, given.x, given.lora_a, given.lora_b, **given.options)
    assert y is base
    assert base._version > version
    torch.testing.assert_close(base, expected)


def test_a_new_sum_leaves_base_as_it_is(path):
    given = operands()
    base = torch.randn(5, 16)
    before = base.clone()
    y = lora_add(base, given.x, given.lora_a, given.lora_b, **given.options)
    assert torch.equal(base, before)
    assert y.data_ptr() != base.data_ptr()


def test_a_backward_that_needs_what_was_overwritten_is_refused(path):
    given = operands()
    leaf = torch.randn(5, 16, requires_grad=True)
    y = lora_add_(leaf.sigmoid(), given.x, given.lora_a, given.lora_b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_leaf_that_requires_a_gradient_is_refused_before_it_is_written(path):
    given = operands()
    leaf = torch.randn(5, 16, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        lora_add_(leaf, given.x, given.lora_a, given.lora_b)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("path", ["auto", "composed"])
def test_base_may_not_overlap_what_is_read(path):
    given = operands(in_features=16)
    with use_path(path), pytest.raises(RuntimeError, match="single memory location"):
        lora_add_(given.x, given.x, given.lora_a, given.lora_b)


def test_a_part_of_a_larger_tensor_is_written_in_place(op):
    """By a view's own rule of torch: the gradient of the rest stays what it was."""
    given = operands((4,))
    whole = torch.randn(4, 40)
    gradients = []
    for add in (op, reference.lora_add):
        leaf = whole.clone().requires_grad_()
        buffer = leaf * 1
        y = add(buffer[:, 8:24], given.x, given.lora_a, given.lora_b, **given.options)
        (y.square().sum() + buffer[:, :8].sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_view_made_its_own_tensor_may_be_written_where_torch_refuses_the_view():
    """bitsandbytes' layers give such: a view that a custom Function returned."""

    class Give(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x * 2).view(2, 2, 16)

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy.reshape(4, 16)

    given = operands((2, 2))
    leaf = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        lora_add_(Give.apply(leaf), given.x, given.lora_a, given.lora_b)
    given_view = Give.apply(leaf)
    base = fused_lora.binary.BINARY.module.as_no_view(given_view)
    y = lora_add_(base, given.x, given.lora_a, given.lora_b)
    assert y.data_ptr() == given_view.data_ptr()
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx, torch.full((4, 16), 2.0))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)])
def test_saves_x_by_reference_and_h_and_the_seed(op, dtype, adapter_dtype, dropout_p):
    given = operands((32,), 24, 16, 4, dtype, adapter_dtype, dropout_p=dropout_p)
    for tensor in (given.x, given.lora_a, given.lora_b):
        tensor.requires_grad_()
    base = torch.randn(32, 16).to(dtype)
    saved = saved_tensors(lambda: op(base, given.x, given.lora_a, given.lora_b, **given.options))
    assert any(t.data_ptr() == given.x.data_ptr() for t in saved)
    seed_bytes = 8 if dropout_p else 0
    h_bytes = 32 * 4 * adapter_dtype.itemsize
    assert own_bytes(saved, [given.x, given.lora_a, given.lora_b]) == h_bytes + seed_bytes


def test_frozen_adapters_keep_nothing(op):
    given = operands((32,))
    given.x.requires_grad_()
    saved = saved_tensors(lambda: op(torch.randn(32, 16), given.x, given.lora_a, given.lora_b))
    assert own_bytes(saved, given.tensors) == 0


# What torch does with functions


def test_a_checkpoint_draws_the_same_mask_again(op):
    given = operands((9,))

    def call(x, weight, lora_a, lora_b, bias):
        return op(F.linear(x, weight, bias), x, lora_a, lora_b, dropout_p=0.4)

    results = []
    for run in (call, lambda *t: checkpoint(call, *t, use_reentrant=False)):
        torch.manual_seed(3)
        given.options = {}
        results.append(forward_and_backward(run, given))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_inference_mode(op):
    given = operands()
    with torch.inference_mode():
        y = beside(op)(*given.tensors, **given.options)
    torch.testing.assert_close(y, beside(lora_add)(*given.tensors, **given.options))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_first_and_second_derivatives_in_float64(op, dropout_p):
    given = operands((3,), 5, 4, 2, F64)
    leaves = [tensor.requires_grad_() for tensor in (torch.randn(3, 4, dtype=F64), *given.tensors[:1])]
    leaves += [given.lora_a.requires_grad_(), given.lora_b.requires_grad_()]

    def call(base, *tensors):
        return op(base * 1, *tensors, scaling=1.5, dropout_p=dropout_p, seed=3)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f, x: vmap(f)(x),
    "a batch of backwards": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func(transform):
    given = operands((4,), 6, 5, 2, F64)

    def of(add):
        return lambda x: add(x[..., :5] * 2, x, given.lora_a, given.lora_b, scaling=1.5)

    torch.testing.assert_close(
        transform(of(lora_add), given.x),
        transform(of(lambda base, x, a, b, scaling: base + F.linear(F.linear(x, a), b) * scaling), given.x),
    )


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dtype, adapter_dtype, dropout_p):
    given = operands((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    base = torch.randn(2, 3, 16).to(dtype)
    arguments = [t.detach().requires_grad_() for t in (base, given.x, given.lora_a, given.lora_b)]
    opcheck(torch.ops.fused_lora.lora_add, arguments, given.options, rtol=2e-2, atol=2e-2)
    frozen = [t.detach() for t in arguments]
    opcheck(torch.ops.fused_lora.lora_add_, frozen, given.options, rtol=2e-2, atol=2e-2)


def test_opcheck_halves():
    given = operands((2, 3), dtype=BF16, adapter_dtype=F32, dropout_p=0.3)
    base = torch.randn(2, 3, 16)
    adapter = (given.lora_a, given.lora_b)
    tail = (1.5, 0.3, given.options["seed"], False)
    opcheck(torch.ops.fused_lora.lora_add_forward, (base, given.x, *adapter, *tail))
    opcheck(torch.ops.fused_lora.lora_add_forward_, (base, given.x, *adapter, *tail))
    y, h = torch.ops.fused_lora.lora_add_forward(base, given.x, *adapter, *tail)
    for needed in ([True] * 3, [True, False, False], [False, True, True]):
        x_or_none, h_or_none = given.x if needed[1] else None, h if needed[2] else None
        arguments = (y, x_or_none, *adapter, h_or_none, BF16, *tail, needed)
        opcheck(torch.ops.fused_lora.lora_add_backward, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_full_graph(op, dropout_p):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    given = operands((2, 3), dropout_p=dropout_p)
    compiled = torch.compile(beside(op), backend=counter, fullgraph=True)
    got = forward_and_backward(compiled, given)
    assert counter.frame_count == 1
    torch.testing.assert_close(got, forward_and_backward(beside(op), given))


# Choices and words


def test_a_path_asked_for_by_name_serves_or_says_why_not():
    given = operands((5,), dtype=F16)
    with (
        use_path("fused"),
        pytest.raises(RuntimeError, match="lora_add: path 'fused' was asked for, but there"),
    ):
        lora_add(torch.randn(5, 16).half(), given.x, given.lora_a, given.lora_b)
    wide = operands((5,))
    with use_path("fused"), pytest.raises(RuntimeError, match=r"no fused kernels for torch\.float64"):
        lora_add(torch.randn(5, 16).double(), wide.x, wide.lora_a, wide.lora_b)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_was_timed_left_base_as_it_was(in_place, monkeypatch, tmp_path):
    """A sum in place of base is formed once, however often the paths were timed."""
    monkeypatch.setenv(fused_lora.choices.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv(fused_lora.choices.TIMING_VARIABLE, "1")
    fused_lora.binary.BINARY.module.forget_choices()
    given = operands((40,), 72, 104, 8)
    base = torch.randn(40, 104)
    expected = reference.lora_add(base, given.x, given.lora_a, given.lora_b, **given.options)
    y = (lora_add_ if in_place else lora_add)(base, given.x, given.lora_a, given.lora_b, **given.options)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (remembered,) = (file.read_text() for file in tmp_path.glob("*.json"))
    assert "adds=float32" in remembered
    assert ("in place" in remembered) == in_place
    fused_lora.binary.BINARY.module.forget_choices()


def test_explain_knows_the_adapter_alone():
    shape = {"rows": 40, "in_features": 72, "out_features": 104, "rank": 8, "dtype": F32}
    whole, alone = (explain("cpu", **shape, adapter_alone=alone) for alone in (False, True))
    assert whole.splitlines()[0] == alone.splitlines()[0]
    assert "choices:" in alone


def changed(**changes):
    given = operands()
    arguments = {"base": torch.randn(5, 16), "x": given.x, "lora_a": given.lora_a, "lora_b": given.lora_b}
    arguments |= {"dropout_p": 0.0, "seed": None, "column_offset": 0}
    return {name: changes[name](value) if name in changes else value for name, value in arguments.items()}


# in 24, out 16, rank 4, x 5×24
ERRORS = [
    ({"x": lambda x: x[0, 0]}, ValueError, "x must have at least 1 dimension, got shape []"),
    (
        {"x": lambda x: x[:, :23]},
        ValueError,
        "x must have in_features = 24 (as lora_a) in dimension -1, got shape [5, 23]",
    ),
    (
        {"base": lambda y: y[:4]},
        ValueError,
        "base must have rows = 5 (as x) in dimension 0, got shape [4, 16]",
    ),
    (
        {"base": lambda y: y[:, :15]},
        ValueError,
        "base must have out_features = 16 (as lora_b) in dimension -1, got shape [5, 15]",
    ),
    ({"base": lambda y: y[0]}, ValueError, "base must have as many dimensions as x (2), got shape [16]"),
    (
        {"lora_a": lambda a: a[None]},
        ValueError,
        "lora_a must be 2-D (rank×in_features), got shape [1, 4, 24]",
    ),
    ({"lora_b": lambda b: b[0]}, ValueError, "lora_b must be 2-D (out_features×rank), got shape [4]"),
    (
        {"lora_b": lambda b: b[:, :3]},
        ValueError,
        "lora_b must have rank = 4 (as lora_a) in dimension 1, got shape [16, 3]",
    ),
    (
        {"lora_a": lambda a: a[:0], "lora_b": lambda b: b[:, :0]},
        ValueError,
        "lora_a must have rank ≥ 1, got shape [0, 24]",
    ),
    (
        {"x": lambda x: x.long()},
        TypeError,
        "x must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got torch.int64",
    ),
    (
        {"base": lambda y: y.long()},
        TypeError,
        "base must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got torch.int64",
    ),
    ({"lora_a": lambda a: a.to(BF16)}, TypeError, "lora_a must be torch.float32 (as x), got torch.bfloat16"),
    (
        {"x": lambda x: x.to(BF16), "lora_a": lambda a: a.to(F16)},
        TypeError,
        "lora_a must be torch.bfloat16 (as x) or torch.float32 (masters), got torch.float16",
    ),
    (
        {"lora_b": lambda b: b.to(F64)},
        TypeError,
        "lora_b must be torch.float32 (as lora_a), got torch.float64",
    ),
    ({"base": lambda y: y.to("meta")}, ValueError, "base must be on cpu (as x), got meta"),
    ({"lora_b": lambda b: b.to("meta")}, ValueError, "lora_b must be on cpu (as x), got meta"),
    ({"dropout_p": lambda _: 1.5}, ValueError, "dropout_p must be in [0, 1], got 1.5"),
    (
        {"dropout_p": lambda _: 0.5, "seed": lambda _: torch.tensor([1, 2])},
        ValueError,
        "seed must hold one number, got shape [2]",
    ),
    ({"column_offset": lambda _: 12}, ValueError, "column_offset must be a multiple of 8 and ≥ 0, got 12"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS, ids=[case[2][:50] for case in ERRORS])
def test_the_error_names_the_argument_in_the_same_words_on_every_path(op, path, changes, kind, message):
    with pytest.raises(kind) as raised:
        op(**changed(**changes))
    assert str(raised.value).splitlines()[0] == f"lora_add: {message}"


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS[:5])
def test_fakes_raise_the_same(changes, kind, message):
    given = changed(**changes)
    with pytest.raises(kind) as raised:
        lora_add(**{name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in given.items()})
    assert str(raised.value).splitlines()[0] == f"lora_add: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "x must be given for dlora_a"),
        ({"h": None}, "h must be given for dlora_b"),
        ({"h": torch.randn(5, 3)}, "h must have rank = 4"),
        ({"dy": torch.randn(4, 16)}, "x must have rows = 4"),
        ({"dy": torch.randn(5, 15)}, "dy must have out_features = 16"),
        ({"dtype": BF16}, "x must be torch.bfloat16"),
    ],
)
def test_backward_checks_what_it_is_handed(changes, message):
    x, _, lora_a, lora_b, _ = operands().tensors
    named = {"dy": torch.randn(5, 16), "x": x, "lora_a": lora_a, "lora_b": lora_b, "h": torch.randn(5, 4)}
    named |= {"dtype": F32, "scaling": 1.0, "dropout_p": 0.0, "seed": None, "round_adapters": False}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.fused_lora.lora_add_backward(**{**named, "needed": [True] * 3, **changes})
