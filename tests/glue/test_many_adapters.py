"""The CUDA ops of batches whose rows belong to different adapters, from checks to launches."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from tests.operands import BF16, F16, F32
from tests.test_many_adapters import check, mixed, output_and_gradients, shuffled

ORDERS = {"sorted": shuffled(70).sort().values, "in any order": shuffled(9), "none": [-1, -1]}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("index", ORDERS.values(), ids=ORDERS)
def test_every_dtype_is_as_exact_as_torch(emulated, dtype, index):
    given = mixed(index, 64, 48, (8, 16, 3, 1), dtype, dropout_p=0.3)
    emulated.run(lambda: check(given, emulated.ops.lora_linear_mixed))


def test_more_adapters_than_a_launch_has_room_for(emulated):
    given = mixed([0, 255, 256, 299, -1], 16, 8, (1,) * 300)
    emulated.run(lambda: check(given, emulated.ops.lora_linear_mixed))


def test_an_index_beyond_the_adapters_means_none(emulated):
    given = mixed([0, 4, 1, 1000])
    y = emulated.run(lambda: given.call(emulated.ops.lora_linear_mixed)).value
    given.index = torch.tensor([0, -1, 1, -1])
    torch.testing.assert_close(y, given.call(torch.ops.fused_lora.lora_linear_mixed))


def test_opcheck(emulated):
    given = mixed([1, -1, 2], dtype=BF16, adapter_dtype=F32, dropout_p=0.3).leaves()
    arguments = (given.x, given.weight, given.lora_a, given.lora_b, given.index, given.bias)
    op = emulated.ops.lora_linear_mixed
    emulated.run(lambda: opcheck(op, arguments, given.options, rtol=2e-2, atol=2e-2))


def test_the_composed_path(emulated):
    emulated.module.set_path("composed")
    given = mixed(shuffled(20))
    found = emulated.run(lambda: output_and_gradients(given, emulated.ops.lora_linear_mixed)).value
    torch.testing.assert_close(found, output_and_gradients(given, torch.ops.fused_lora.lora_linear_mixed))
