"""What the op keeps for backward: x, h and the seed."""

from __future__ import annotations

import pytest
import torch

import fused_lora
from tests.operands import BF16, DTYPES, F32, operands

pytestmark = pytest.mark.usefixtures("either_path")


def saved_tensors(call) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


def own_bytes(saved, parameters) -> int:
    """Bytes of distinct storages among `saved`, those of `parameters` left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for pointer, size in storages.items() if pointer not in known)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saves_x_by_reference_and_h_and_the_seed(dtype, adapter_dtype, dropout_p):
    given = operands((32,), 24, 16, 4, dtype, adapter_dtype, dropout_p=dropout_p)
    x, weight, lora_a, lora_b, bias = given.tensors
    for tensor in (x, lora_a, lora_b):
        tensor.requires_grad_()
    saved = saved_tensors(lambda: fused_lora.lora_linear(*given.tensors, **given.options))
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    h_bytes = 32 * 4 * lora_a.element_size()
    seed_bytes = 8 if dropout_p else 0
    assert own_bytes(saved, [x, weight, lora_a, lora_b, bias]) == h_bytes + seed_bytes


def test_frozen_adapters_keep_neither_x_nor_h():
    given = operands((32,))
    given.x.requires_grad_()
    saved = saved_tensors(lambda: fused_lora.lora_linear(*given.tensors, **given.options))
    assert not any(t.data_ptr() == given.x.data_ptr() for t in saved)
    assert own_bytes(saved, given.tensors[1:]) == 0


def test_autocast_keeps_one_cast_of_x_and_no_cast_of_the_adapters():
    given = operands((32,), dtype=F32)
    for tensor in (given.x, given.lora_a, given.lora_b):
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        saved = saved_tensors(lambda: fused_lora.lora_linear(*given.tensors, **given.options))
    adapters = [t for t in saved if t.shape in (given.lora_a.shape, given.lora_b.shape)]
    assert [t.dtype for t in adapters] == [F32, F32]
    assert [t.dtype for t in saved if t.shape == given.x.shape] == [BF16]
