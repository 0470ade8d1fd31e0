"""lora_linear_grouped against lora_linear of each projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import fused_lora
from fused_lora import lora_linear, lora_linear_grouped
from tests.operands import (
    BF16,
    DTYPES,
    F32,
    F64,
    Operands,
    assert_no_worse_than_torch,
    exact_dy,
    operands,
    torch_sequence,
)
from tests.test_op import STRIDED
from tests.test_saved_memory import saved_tensors

NEEDS = ("x", "lora_a", "lora_b")
# out_features and rank of each projection.
QKV = ((16, 4), (9, 1), (40, 17))


@pytest.fixture(params=["auto", "composed"], autouse=True)
def path(request):
    with fused_lora.use_path(request.param):
        yield request.param


@dataclass
class Given:
    """Projections of one x, each with operands of its own."""

    x: Tensor
    members: list[Operands]

    def double(self) -> Given:
        return Given(self.x.detach().double(), [m.double() for m in self.members])


def given_group(
    lead=(7,), in_features=24, sizes=QKV, dtype=F32, adapter_dtype=None, scalings=(1.5, 1.5, 1.5), **options
) -> Given:
    members = [
        operands(lead, in_features, out, rank, dtype, adapter_dtype, scaling=scaling, key=key, **options)
        for key, ((out, rank), scaling) in enumerate(zip(sizes, scalings, strict=False))
    ]
    return Given(members[0].x, members)


def grouped(
    x: Tensor, members: list[tuple[Any, ...]], options: list[dict[str, Any]], op=lora_linear_grouped
) -> list[Tensor]:
    weights, a, b, biases = (list(column) for column in zip(*members, strict=True))
    return op(
        x,
        *(weights, a, b, biases),
        scalings=[o["scaling"] for o in options],
        dropout_p=[o["dropout_p"] for o in options],
        seeds=[o.get("seed") for o in options],
    )


def each(op):
    def separately(x, members, options):
        return [op(x, *member, **own) for member, own in zip(members, options, strict=True)]

    return separately


def run(op, given: Given, needs=NEEDS, taken=None, dys=None):
    """(ys, {(name, projection): gradient}) on fresh leaves; taken: the projections whose y is used."""
    x = given.x.detach().requires_grad_("x" in needs)
    members = []
    for m in given.members:
        names = ("weight", "lora_a", "lora_b", "bias")
        members.append(
            tuple(
                None if t is None else t.detach().requires_grad_(name in needs)
                for name, t in zip(names, m.tensors[1:], strict=True)
            )
        )
    ys = op(x, members, [m.options for m in given.members])
    taken = range(len(ys)) if taken is None else taken
    dys = dys or [exact_dy(y).to(y.dtype) for y in ys]
    wanted: dict[Any, Tensor] = {("x", None): x} if x.requires_grad else {}
    for i, member in enumerate(members):
        for name, t in zip(("weight", "lora_a", "lora_b", "bias"), member, strict=True):
            if t is not None and t.requires_grad:
                wanted[name, i] = t
    made = torch.autograd.grad(
        [ys[i] for i in taken], list(wanted.values()), [dys[i] for i in taken], allow_unused=True
    )
    return [y.detach() for y in ys], dict(zip(wanted, made, strict=True))


def check(given: Given, needs=NEEDS, taken=None, group=grouped) -> None:
    ours, own, exact = (
        run(op, of, needs, taken)
        for op, of in (
            (group, given),
            (each(torch_sequence), given),
            (each(torch_sequence), given.double()),
        )
    )
    for i in range(len(ours[0])):
        assert_no_worse_than_torch(ours[0][i], own[0][i], exact[0][i], f"y of {i}")
    assert ours[1].keys() == own[1].keys()
    for key, gradient in ours[1].items():
        if own[1][key] is None:
            assert gradient is None, key
        else:
            assert_no_worse_than_torch(gradient, own[1][key], exact[1][key], f"gradient of {key}")


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_dtype_is_as_exact_as_torch(dtype, adapter_dtype, dropout_p):
    check(given_group((2, 65), 136, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("lead", [(1,), (0,), (), (2, 0, 3), (2, 3), (300,)])
@pytest.mark.parametrize(
    ("sizes", "dtype"), [(QKV, F32), (QKV, BF16), (((33, 3),), F32), (((1, 1), (64, 8)), BF16)]
)
def test_every_shape(lead, sizes, dtype):
    check(given_group(lead, 48, sizes, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (0.5, 1.25, 3.0)])
def test_scalings_of_their_own_and_no_bias(dtype, scalings):
    check(given_group((40,), scalings=scalings, dtype=dtype, bias=False))


@pytest.mark.parametrize(
    "needs", [("x",), ("lora_a",), ("lora_b",), ("weight", "bias"), ("x", "weight", "lora_b")]
)
def test_gradients_go_to_what_needs_them(needs):
    check(given_group(), needs)


@pytest.mark.parametrize("taken", [(0,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_outputs_that_lead_nowhere_have_no_gradients(taken, dropout_p):
    check(given_group(dropout_p=dropout_p), taken=taken)


def test_projections_that_train_nothing_are_told_apart():
    given = given_group()
    for t in given.members[0].tensors[2:4]:
        t.requires_grad_()
    ys = grouped(given.x, [m.tensors[1:] for m in given.members], [m.options for m in given.members])
    assert [y.requires_grad for y in ys] == [True, False, False]


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_x_gives_what_a_contiguous_copy_gives(view):
    x = view(operands((10,), in_features=32).x)
    given = given_group(in_features=x.shape[-1])
    got = run(grouped, Given(x, given.members))
    torch.testing.assert_close(got, run(grouped, Given(x.contiguous(), given.members)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_dy_and_transposed_parameters(dtype):
    given = given_group((6,), dtype=dtype)
    dys = [
        torch.ones((), dtype=dtype).expand(6, 16),
        torch.randn(9, 6).to(dtype).t(),
        torch.randn(6, 80).to(dtype)[:, ::2],
    ]
    expected = run(grouped, given, dys=[dy.contiguous() for dy in dys])
    for m in given.members:
        m.weight, m.lora_a, m.lora_b = (t.t().contiguous().t() for t in (m.weight, m.lora_a, m.lora_b))
    torch.testing.assert_close(run(grouped, given, dys=dys), expected)


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_fused_path_computes_a_group_bit_for_bit_as_its_members(
    path, rows, dtype, adapter_dtype, dropout_p
):
    """But for dx, whose terms are added up in another order."""
    if path != "auto":
        pytest.skip("of the kernels alone")
    given = given_group(
        (rows,), 576, ((576, 16), (192, 16), (192, 4)), dtype, adapter_dtype, dropout_p=dropout_p
    )
    (ys, made), (own_ys, own) = (run(op, given) for op in (grouped, each(lora_linear)))
    for i in range(3):
        assert torch.equal(ys[i], own_ys[i])
    for key in made.keys() - {("x", None)}:
        assert torch.equal(made[key], own[key]), key


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    given = given_group((150,), 576, ((300, 16), (192, 8)), BF16, F32, dropout_p=0.1)
    expected = run(grouped, given)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run(grouped, given)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, got[0], expected[0]))
    if fused_lora.paths.asked() == "auto":
        assert all(torch.equal(got[1][key], expected[1][key]) for key in got[1])


def test_x_is_saved_once_and_the_h_are_what_is_saved_beside_it():
    given = given_group((32,), bias=False)
    x = given.x.requires_grad_()
    members = [tuple(None if t is None else t.requires_grad_() for t in m.tensors[1:]) for m in given.members]
    options = [m.options for m in given.members]

    def own_bytes(op):
        saved = saved_tensors(lambda: op(x, members, options))
        known = {t.data_ptr() for t in (x, *(t for m in members for t in m if t is not None))}
        assert sum(t.data_ptr() == x.data_ptr() for t in saved) == (1 if op is grouped else 3)
        return sum(t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in known)

    assert own_bytes(grouped) == own_bytes(each(lora_linear)) == 4 * 32 * (4 + 1 + 17)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_casts_x_once(dtype):
    given = given_group((32,), dtype=dtype, adapter_dtype=F32)
    x = given.x.requires_grad_()
    members = [
        (m.weight, m.lora_a.requires_grad_(), m.lora_b.requires_grad_(), m.bias) for m in given.members
    ]
    options = [m.options for m in given.members]
    with torch.autocast("cpu", dtype=BF16):
        ys = grouped(x, members, options)
        own = each(lora_linear)(x, members, options)
        saved = saved_tensors(lambda: grouped(x, members, options))
    torch.testing.assert_close(ys, own)
    assert [y.dtype for y in ys] == [BF16] * 3
    assert [t.dtype for t in saved if t.shape == x.shape] == [BF16]


def test_gradcheck_and_second_derivatives():
    given = given_group((3,), 4, ((3, 2), (2, 1)), F64)
    leaves = [given.x, *(t for m in given.members for t in m.tensors[1:])]
    leaves = [t.requires_grad_() for t in leaves]
    for dropout_p in (0.0, 0.4):

        def op(x, *flat, p=dropout_p):
            members = [flat[:4], flat[4:]]
            options = [{"scaling": 1.5, "dropout_p": p, "seed": seed} for seed in (3, 4)]
            return tuple(grouped(x, members, options))

        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)


def test_outputs_may_be_changed_in_place():
    given = given_group()

    def scaled(op):
        def call(*args):
            return [y.mul_(2) for y in op(*args)]

        return call

    torch.testing.assert_close(run(scaled(grouped), given), run(scaled(each(lora_linear)), given))


def flat_arguments(given: Given):
    weights, a, b, biases = (list(c) for c in zip(*(m.tensors[1:] for m in given.members), strict=True))
    return given.x, weights, a, b, biases


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
def test_opcheck(dropout_p, dtype, adapter_dtype):
    given = given_group((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    x, weights, a, b, biases = flat_arguments(given)
    scalings, ps = [1.5] * 3, [dropout_p] * 3
    seeds = [m.options.get("seed") for m in given.members]
    leaves = [[t.detach().requires_grad_() for t in ts] for ts in (a, b)]
    opcheck(
        torch.ops.fused_lora.lora_linear_grouped,
        (x.detach().requires_grad_(), weights, *leaves, biases),
        {"scalings": scalings, "dropout_p": ps, "seeds": seeds},
        rtol=2e-2,
        atol=2e-2,
    )
    tail = (scalings, ps, seeds, False)
    opcheck(torch.ops.fused_lora.lora_linear_grouped_forward, (x, weights, a, b, biases, *tail))
    ys, h = torch.ops.fused_lora.lora_linear_grouped_forward(x, weights, a, b, biases, *tail)
    hs = list(h.split([rank for _, rank in QKV], dim=1))
    for needed in ([True] * 13, [True, *[False, True, True, False] * 3], [False, *[False] * 11, True]):
        opcheck(torch.ops.fused_lora.lora_linear_grouped_backward, (ys, x, weights, a, b, hs, *tail, needed))


def test_full_graph():
    given = given_group((2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, given), run(grouped, given))


def without(arguments, name):
    changed = dict(arguments)
    changed[name] = changed[name][:2]
    return changed


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "biases", "scalings", "dropout_p", "seeds"])
def test_lists_of_different_lengths_are_an_error(name):
    given = given_group(dropout_p=0.3)
    x, weights, a, b, biases = flat_arguments(given)
    arguments = {"weights": weights, "lora_a": a, "lora_b": b, "biases": biases}
    arguments |= {"scalings": [1.0] * 3, "dropout_p": [0.3] * 3, "seeds": [1, 2, 3]}
    with pytest.raises(ValueError, match=rf"{name} must have 3 entries \(as weights\), got 2"):
        lora_linear_grouped(x, **without(arguments, name))


def test_errors_name_the_projection():
    given = given_group()
    x, weights, a, b, biases = flat_arguments(given)
    with pytest.raises(ValueError, match="weights must not be empty"):
        lora_linear_grouped(x, [], [], [], scalings=[])
    with pytest.raises(ValueError, match=r"lora_a must have in_features = 24(.|\n)*of projection 1"):
        lora_linear_grouped(x, weights, [a[0], a[1][:, 1:], a[2]], b, biases, scalings=[1.0] * 3)
    with pytest.raises(TypeError, match=r"lora_a\[2\] must be torch.float32 \(as lora_a\[0\]\)"):
        lora_linear_grouped(x, weights, [*a[:2], a[2].double()], b, biases, scalings=[1.0] * 3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_plain_torch_computes_the_same(dropout_p):
    given = given_group(dropout_p=dropout_p)
    ours = run(grouped, given)
    with fused_lora.use_path("reference"):
        torch.testing.assert_close(run(grouped, given), ours)
