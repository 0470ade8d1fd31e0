"""The op over shapes, dtypes, strides and flags that nobody thought of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lora import lora_linear, use_path
from tests.operands import DTYPES, GRADIENTS, check_against_torch, operands

sizes = st.integers(1, 40)


@pytest.mark.parametrize("path", ["auto", "composed"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    in_features=sizes,
    out_features=sizes,
    rank=st.integers(1, 48),
    dtypes=st.sampled_from(DTYPES),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    scaling=st.sampled_from([0.0, 1.0, -0.25, 4.0]),
    needs=st.sets(st.sampled_from(GRADIENTS)),
    transpose=st.sets(st.sampled_from(["weight", "lora_a", "lora_b"])),
    gap=st.booleans(),
    key=st.integers(0, 2**16),
)
def test_op_is_as_exact_as_torch(
    path, lead, in_features, out_features, rank, dtypes, bias, dropout_p, scaling, needs, transpose, gap, key
):
    case = operands(
        lead,
        in_features,
        out_features,
        rank,
        *dtypes,
        bias=bias,
        dropout_p=dropout_p,
        scaling=scaling,
        key=key,
    )
    for name in transpose:
        setattr(case, name, getattr(case, name).t().contiguous().t())
    if gap and lead:  # every second row of a larger tensor
        case.x = torch.cat([case.x, case.x], dim=-1)[..., :in_features]
    needed = tuple(name for name in GRADIENTS if name in needs and not (name == "bias" and not bias))
    with use_path(path):
        check_against_torch(case, lora_linear, needed)
