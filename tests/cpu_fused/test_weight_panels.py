"""The weight laid out once: its panels, and calls that read them."""

from __future__ import annotations

import pytest
import torch

from tests.cpu_fused.library import LEVELS, fits_panels, op, pack, supported_levels, unpack
from tests.operands import BF16, F32, check_against_torch, forward_and_backward, operands

KINDS = [(F32, F32), (BF16, BF16), (BF16, F32)]
ROUNDING = {F32: {"rtol": 1e-5, "atol": 2e-5}, BF16: {"rtol": 2**-7, "atol": 2**-8}}
# In, out: one panel, several chunks of the depth and blocks of the output, and no whole tiles of K.
WEIGHTS = [(2, 32), (90, 64), (1602, 96), (130, 1632)]


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in supported_levels():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def expected_panels(weight):
    out_features, in_features = weight.shape
    together = 1 if weight.dtype == F32 else 2
    tiles = weight.reshape(out_features // 32, 32, in_features // together, together)
    return tiles.permute(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("in_features", "out_features"), WEIGHTS)
@pytest.mark.parametrize("stored", [lambda w: w, lambda w: w.t().contiguous().t(), lambda w: w[:, ::2]])
def test_panels_hold_the_weight_and_give_it_back(stored, in_features, out_features, threads, dtype):
    weight = stored(torch.randn(out_features, in_features * 2).to(dtype))
    panels = pack(weight, threads)
    assert torch.equal(panels, expected_panels(weight))
    assert torch.equal(unpack(panels, *weight.shape, threads), weight)


def test_only_whole_panels_and_pairs_fit():
    assert fits_panels(torch.empty(64, 2))
    assert not fits_panels(torch.empty(48, 2))
    assert not fits_panels(torch.empty(64, 3))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KINDS)
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("in_features", "out_features"), WEIGHTS)
def test_a_packed_weight_is_as_exact_as_torch(
    level, in_features, out_features, dropout_p, rows, dtype, adapter_dtype
):
    given = operands((rows,), in_features, out_features, 6, dtype, adapter_dtype, dropout_p=dropout_p)
    check_against_torch(given, op(level, packed=True))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KINDS)
@pytest.mark.parametrize("rows", [1, 3, 17, 65])
def test_many_rows_get_the_bits_of_the_plain_weight(level, rows, dtype, adapter_dtype):
    """The sums have the same order. Of few rows they may have another."""
    given = operands((rows,), 450, 608, 8, dtype, adapter_dtype, dropout_p=0.1)
    packed = forward_and_backward(op(level, packed=True), given)
    plain = forward_and_backward(op(level), given)
    exact = {"rtol": 0, "atol": 0} if rows >= 17 else ROUNDING[dtype]
    torch.testing.assert_close(packed, plain, **exact)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), KINDS)
@pytest.mark.parametrize("rows", [1, 65])
def test_threads_change_no_bit(level, rows, dtype, adapter_dtype):
    given = operands((rows,), 640, 704, 8, dtype, adapter_dtype, dropout_p=0.1)
    one, two = (forward_and_backward(op(level, threads, packed=True), given) for threads in (1, 2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
