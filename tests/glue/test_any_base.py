"""The CUDA ops that add an adapter to what a frozen layer gave, from checks to launches."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fused_lora import reference
from tests.glue.judge import check
from tests.operands import BF16, DTYPES, F16, F32, F64, check_against_torch, forward_and_backward, operands
from tests.test_lora_add import beside

KERNEL_DTYPES = [pair for pair in DTYPES if F64 not in pair]


@pytest.fixture(params=["new", "in place"])
def op(request, emulated):
    return emulated.ops.lora_add_ if request.param == "in place" else emulated.ops.lora_add


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("lead", "sizes"), [((2, 9), (40, 24, 3)), ((40,), (64, 48, 8))])
def test_every_dtype_is_as_exact_as_torch(emulated, op, dtype, adapter_dtype, dropout_p, lead, sizes):
    given = operands(lead, *sizes, dtype, adapter_dtype, dropout_p=dropout_p)
    emulated.run(lambda: check(given, beside(op)))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0, 3)])
@pytest.mark.parametrize("sizes", [(24, 16, 4), (1, 16, 1), (24, 1, 40)])
def test_small_and_empty_shapes(emulated, op, lead, sizes):
    given = operands(lead, *sizes, BF16, F32, dropout_p=0.3)
    emulated.run(lambda: check(given, beside(op)))


@pytest.mark.parametrize("needs", [(), ("x",), ("lora_a",), ("lora_b",), ("weight", "bias")])
def test_gradients_go_to_what_needs_them(emulated, op, needs):
    given = operands((3, 5), dropout_p=0.3)
    emulated.run(lambda: check_against_torch(given, beside(op), needs))


def test_a_step_is_two_launches_and_four_back(emulated, op):
    given = operands((40,), 64, 48, 8, BF16)
    forward = len(emulated.run(lambda: beside(op)(*given.tensors)).launches)
    both = len(emulated.run(lambda: forward_and_backward(beside(op), given)).launches)
    assert 0 < forward <= 2
    assert forward < both <= forward + 4


def test_a_strided_base_is_read_where_it_lies(emulated):
    given = operands((9,), 32, 16, 8, BF16)
    base = torch.randn(9, 2, 16).to(BF16)[:, 1]
    y = emulated.run(
        lambda: emulated.ops.lora_add(base, given.x, given.lora_a, given.lora_b, **given.options)
    ).value
    expected = reference.lora_add(base, given.x, given.lora_a, given.lora_b, **given.options)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_a_base_of_another_dtype_than_x_is_composed(emulated):
    given = operands((9,), 32, 16, 8, F16)
    base = torch.randn(9, 16)
    arguments = (base, given.x, given.lora_a, given.lora_b)
    with pytest.raises(RuntimeError, match="the kernels add to a tensor of x's dtype alone"):
        emulated.ops.lora_add(*arguments)
    emulated.module.set_path("auto")
    y = emulated.run(lambda: emulated.ops.lora_add(*arguments)).value
    assert y.dtype == F32
    torch.testing.assert_close(y, reference.lora_add(*arguments), rtol=1e-2, atol=1e-2)


def test_opcheck(emulated):
    given = operands((2, 3), dtype=BF16, adapter_dtype=F32, dropout_p=0.3)
    arguments = [torch.randn(2, 3, 16).to(BF16), given.x, given.lora_a, given.lora_b]
    for op in (emulated.ops.lora_add, emulated.ops.lora_add_):
        emulated.run(lambda op=op: opcheck(op, arguments, given.options, rtol=2e-2, atol=2e-2))


def test_explain_names_the_kernels(emulated):
    told = emulated.module.explain_shape(
        *(512, 576, 1536, 16, BF16, F32, False, False, False, False), True, (80, 108, 163 << 10)
    )
    for half in ("forward", "backward"):
        shape, kernels, _ = told[half]
        assert "weight=absent adds=bfloat16" in shape
        assert "tensor cores" in kernels
