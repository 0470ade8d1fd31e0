"""The grouped op on the emulated GPU."""

from __future__ import annotations

from functools import partial

import pytest

from tests.operands import BF16, F32
from tests.test_grouped_op import check, given_group, grouped


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("asked", ["fused", "composed"])
def test_a_group_is_as_exact_as_torch(emulated, dtype, adapter_dtype, dropout_p, asked):
    given = given_group((2, 9), 40, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    emulated.module.set_path(asked)
    op = partial(grouped, op=emulated.ops.lora_linear_grouped)
    emulated.run(lambda: check(given, group=op))


@pytest.mark.parametrize("needs", [("x",), ("lora_a", "lora_b")])
def test_a_group_in_which_one_output_is_not_used(emulated, needs):
    op = partial(grouped, op=emulated.ops.lora_linear_grouped)
    emulated.run(lambda: check(given_group(dtype=BF16), needs, taken=(0, 2), group=op))
