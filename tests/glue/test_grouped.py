"""The grouped op on the emulated GPU."""

from __future__ import annotations

from functools import partial

import pytest

from tests.operands import BF16, F32
from tests.test_grouped_op import check, given_group, grouped, run


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


def test_a_group_reads_x_once_for_all_h_and_once_for_all_da(emulated):
    given = given_group((70,), 72, sizes=((136, 8), (72, 5), (40, 16)), dtype=BF16, dropout_p=0.2)
    op = partial(grouped, op=emulated.ops.lora_linear_grouped)
    launches = emulated.run(lambda: run(op, given)).launches
    x = [launch.buffers["x"].unique_read for launch in launches if "x" in launch.buffers]
    read = [count for count in x if count]
    # Every h, the three frozen products, every dA.
    assert read == [given.x.numel() * 2] * 5
    added = [launch.buffers["dx"] for launch in launches if "dx" in launch.buffers]
    touched = [(dx.unique_read, dx.unique_written) for dx in added if dx.unique_written]
    size = given.x.numel() * 2
    assert touched == [(0, size), (size, size), (size, size)]
