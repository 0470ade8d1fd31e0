"""The ways of few rows: whole runs of W, read where it lies, for up to sixteen rows."""

from __future__ import annotations

import pytest
import torch

from tests.cpu_fused.library import LEVELS, fits_panels, op, supported_levels
from tests.operands import BF16, F32, check_against_torch, forward_and_backward, operands

ROUNDING = {F32: {"rtol": 1e-5, "atol": 2e-5}, BF16: {"rtol": 2**-7, "atol": 2**-8}}
FEW = range(1, 18)


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in supported_levels():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("in_features", "out_features", "rank"), [(75, 45, 5), (96, 160, 16)])
def test_every_number_of_rows_is_as_exact_as_torch(level, in_features, out_features, rank, dtype):
    """Rows are taken in groups of nearly the same height."""
    for rows in FEW:
        given = operands((rows,), in_features, out_features, rank, dtype, dropout_p=0.1)
        check_against_torch(given, op(level))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 16])
def test_a_packed_weight_gives_what_a_plain_one_gives(level, rows, dtype):
    given = operands((rows,), 350, 224, 20, dtype, dropout_p=0.1)
    assert fits_panels(given.weight)
    expected = forward_and_backward(op(level), given)
    torch.testing.assert_close(
        forward_and_backward(op(level, packed=True), given), expected, **ROUNDING[dtype]
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("in_features", "out_features"), [(4300, 21), (21, 4300)])
@pytest.mark.parametrize("rows", [1, 16])
def test_wide_blocks_and_long_depths_are_as_exact_as_torch(level, rows, in_features, out_features, dtype):
    check_against_torch(operands((rows,), in_features, out_features, 4, dtype), op(level))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_threads_change_no_bit(level, rows, dtype):
    given = operands((rows,), 2080, 2112, 9, dtype, dropout_p=0.1)
    one, three = (forward_and_backward(op(level, threads), given) for threads in (1, 3))
    torch.testing.assert_close(one, three, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rank", [3, 8])
def test_what_lies_beside_a_view_is_not_used(level, name, dtype, rank):
    """Vectors may pass the end of a row, where the next one lies, but nobody reads those lanes."""
    for rows in (1, 2, 7):
        given = operands((rows,), 70, 44, rank, dtype)
        expected = forward_and_backward(op(level), given)
        matrix = getattr(given, name)
        wide = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 3), torch.nan, dtype=dtype)
        view = wide[1:-1, 1:-2]
        view.copy_(matrix)
        setattr(given, name, view)
        torch.testing.assert_close(forward_and_backward(op(level), given), expected, **ROUNDING[dtype])
