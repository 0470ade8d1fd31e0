"""The CUDA ops, from checks to launches, against torch's own sequence and the plain-torch path."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fused_lora import reference
from tests.glue.judge import check
from tests.operands import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GRADIENTS,
    check_against_torch,
    forward_and_backward,
    operands,
)
from tests.test_autocast import peft_sequence, under_autocast
from tests.test_op import STRIDED

KERNEL_DTYPES = [pair for pair in DTYPES if F64 not in pair]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize(("dropout_p", "bias"), [(0.0, True), (0.3, False)])
@pytest.mark.parametrize(("lead", "sizes"), [((2, 9), (40, 24, 3)), ((40,), (64, 48, 8))])
def test_every_dtype_is_as_exact_as_torch(emulated, dtype, adapter_dtype, dropout_p, bias, lead, sizes):
    given = operands(lead, *sizes, dtype, adapter_dtype, bias=bias, dropout_p=dropout_p)
    emulated.run(lambda: check(given, emulated))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("sizes", [(24, 16, 4), (1, 16, 1), (24, 1, 40)])
def test_small_and_empty_shapes(emulated, lead, sizes):
    given = operands(lead, *sizes, BF16, F32, dropout_p=0.3)
    emulated.run(lambda: check(given, emulated))


@pytest.mark.parametrize("needs", [(), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), GRADIENTS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_go_to_what_needs_them(emulated, needs, dropout_p):
    given = operands((3, 5), dropout_p=dropout_p)
    emulated.run(lambda: check_against_torch(given, emulated, needs))


def test_what_nothing_needs_is_not_launched(emulated):
    def launches(needs):
        return len(emulated.run(lambda: forward_and_backward(emulated, operands(), needs)).launches)

    forward = len(emulated.run(lambda: emulated(*operands().tensors)).launches)
    assert forward <= 2
    assert launches(("weight", "bias")) == forward
    assert forward < launches(("lora_b",)) <= launches(("lora_a", "lora_b")) <= forward + 4
    assert forward < launches(("x",)) <= launches(("x", "lora_a", "lora_b")) <= forward + 4


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_strided_x_gives_what_a_contiguous_copy_gives(emulated, view, dropout_p):
    x = view(operands((10,), in_features=32).x)
    given = operands(in_features=x.shape[-1], dropout_p=dropout_p)
    given.x = x
    got = emulated.run(lambda: forward_and_backward(emulated, given)).value
    given.x = x.contiguous()
    torch.testing.assert_close(got, forward_and_backward(emulated, given))


def test_a_view_of_x_is_not_copied(emulated):
    """The gaps between its rows stay gaps: the kernels are given the strides, and no second x is made."""
    x = operands((4, 6), 64, dtype=BF16).x[:, ::2, 8:40]
    given = operands((4, 3), 32, dtype=BF16)
    given.x = x
    with torch.profiler.profile() as profile:
        emulated.run(lambda: emulated(*given.tensors))
    assert not [event.name for event in profile.events() if "copy" in event.name or "clone" in event.name]


@pytest.mark.parametrize("transposed", ["weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parameters_may_be_stored_transposed(emulated, transposed, dtype):
    given = operands((9,), 32, 16, 8, dtype)
    expected = forward_and_backward(emulated, given)
    setattr(given, transposed, getattr(given, transposed).t().contiguous().t())
    got = emulated.run(lambda: forward_and_backward(emulated, given)).value
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dy", ["expanded", "transposed"])
def test_strided_dy(emulated, dy):
    given = operands((6,))
    value = torch.ones(()).expand(6, 16) if dy == "expanded" else torch.randn(16, 6).t()
    got = emulated.run(lambda: forward_and_backward(emulated, given, dy=value)).value
    torch.testing.assert_close(got, forward_and_backward(emulated, given, dy=value.contiguous()))


def test_a_strided_bias(emulated):
    given = operands()
    given.bias = torch.randn(16, 2)[:, 1]
    emulated.run(lambda: check_against_torch(given, emulated))


@pytest.mark.parametrize("autocast_dtype", [BF16, F16])
@pytest.mark.parametrize("base_dtype", [F32, "autocast"])
def test_as_exact_as_peft_under_autocast(emulated, autocast_dtype, base_dtype):
    base = autocast_dtype if base_dtype == "autocast" else base_dtype
    given = operands((17,), 72, 40, 8, base, F32, dropout_p=0.2)
    op, peft = (under_autocast(f, autocast_dtype) for f in (emulated, peft_sequence))
    emulated.run(lambda: check_against_torch(given, op, sequence=peft))


def test_the_same_inputs_give_the_same_bits_in_any_order_of_blocks(emulated):
    given = operands((70,), 72, 96, 16, BF16, F32, dropout_p=0.1)
    (y, gradients), (other_y, other_gradients) = (
        emulated.run(lambda: forward_and_backward(emulated, given), order=order).value
        for order in ("forward", "reverse")
    )
    assert torch.equal(y, other_y)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.bool, F32, F64, BF16, F16])
def test_the_mask_is_the_cpus_bit_for_bit(emulated, dtype):
    seed = torch.tensor(-12345678901234)
    options = {"row_offset": 3, "column_offset": 5, "dtype": dtype}
    mask = emulated.run(lambda: emulated.ops.dropout_mask(seed, 9, 37, 0.3, **options)).value
    assert torch.equal(mask, torch.ops.fused_lora.dropout_mask(seed, 9, 37, 0.3, **options))


def test_a_mask_without_elements_and_one_of_integers(emulated):
    seed = torch.tensor([1])
    assert emulated.ops.dropout_mask(seed, 0, 7, 0.3).shape == (0, 7)
    with pytest.raises(NotImplementedError, match=r"dropout_mask: not implemented for torch\.int32"):
        emulated.ops.dropout_mask(seed, 2, 3, 0.3, dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_composed_path_with_the_devices_masks(emulated, dtype, adapter_dtype, dropout_p):
    emulated.module.set_path("composed")
    given = operands((2, 9), 40, 24, 3, dtype, adapter_dtype, dropout_p=dropout_p)
    launches = emulated.run(lambda: check_against_torch(given, emulated)).launches
    assert all("dropout_mask" in launch.kernel for launch in launches)
    assert bool(launches) == (dropout_p > 0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(emulated, dropout_p):
    given = operands((2, 3), dtype=BF16, adapter_dtype=F32, dropout_p=dropout_p)
    leaves = tuple(t.requires_grad_() for t in given.tensors)
    emulated.run(lambda: opcheck(emulated.ops.lora_linear, leaves, given.options, rtol=2e-2, atol=2e-2))


def test_opcheck_halves(emulated):
    given = operands((2, 3), dtype=BF16, adapter_dtype=F32, dropout_p=0.3)
    tail = (1.5, 0.3, given.options["seed"], True)
    opcheck(emulated.ops.lora_linear_forward, (*given.tensors, *tail))
    y, h = emulated.ops.lora_linear_forward(*given.tensors, *tail)
    x, weight, lora_a, lora_b, _ = given.tensors
    for needed in ([True] * 5, [True, False, False, True, False], [False, True, False, False, True]):
        x_or_none = x if needed[1] or needed[2] else None
        h_or_none = h if needed[3] else None
        arguments = (y, x_or_none, weight, lora_a, lora_b, h_or_none, *tail, needed)
        opcheck(emulated.ops.lora_linear_backward, arguments)


def test_compiled_as_one_graph(emulated):
    given = operands((9,), 32, 24, 4, BF16, F32, dropout_p=0.3)
    compiled = torch.compile(lambda *t, **o: emulated(*t, **o), fullgraph=True, backend="aot_eager")
    got = emulated.run(lambda: forward_and_backward(compiled, given)).value
    torch.testing.assert_close(got, forward_and_backward(emulated, given))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_draws_the_same_mask_again(emulated, use_reentrant):
    def layer(*tensors):
        seed = torch.randint(0, 2**63 - 1, (1,))
        return emulated(*tensors, scaling=1.5, dropout_p=0.5, seed=seed)

    def checkpointed(*tensors):
        return checkpoint(layer, *tensors, use_reentrant=use_reentrant)

    results = []
    for op in (layer, checkpointed):
        leaves = [t.requires_grad_() for t in operands().tensors]
        torch.manual_seed(3)
        emulated.run(lambda op=op, leaves=leaves: op(*leaves).square().sum().backward())
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_second_derivatives(emulated):
    given = operands((3,), dropout_p=0.3)
    gradients = []
    for op in (emulated, reference.lora_linear):
        leaves = [t.detach().requires_grad_() for t in given.tensors]
        (dx,) = torch.autograd.grad(op(*leaves, **given.options).square().sum(), leaves[0], create_graph=True)
        gradients.append(torch.autograd.grad(dx.square().sum(), leaves[1:4]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)


def test_inference_mode(emulated):
    given = operands()
    with torch.inference_mode():
        y = emulated.run(lambda: emulated(*given.tensors, **given.options)).value
    torch.testing.assert_close(y, reference.lora_linear(*given.tensors, **given.options))
