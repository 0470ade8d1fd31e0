"""The same inputs give the same bits."""

from __future__ import annotations

import pytest
import torch

from fused_lora import lora_linear
from tests.operands import BF16, DTYPES, F64, forward_and_backward, operands


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [pair for pair in DTYPES if pair[0] != F64])
@pytest.mark.parametrize("rows", [16, 1000])
def test_run_after_run(device, fused, dtype, adapter_dtype, rows):
    given = operands((rows,), 256, 192, 16, dtype, adapter_dtype, dropout_p=0.1).to(device)
    y, gradients = forward_and_backward(lora_linear, given)
    for _ in range(5):
        again = forward_and_backward(lora_linear, given)
        assert torch.equal(again[0], y)
        for name, gradient in gradients.items():
            assert torch.equal(again[1][name], gradient), name


def test_beside_other_work(cuda, fused):
    """Blocks come in another order while another stream keeps the GPU busy."""
    given = operands((4096,), 512, 256, 16, BF16, dropout_p=0.1).to(cuda)
    expected = forward_and_backward(lora_linear, given)
    other = torch.cuda.Stream()
    busy = torch.randn(1024, 1024, device=cuda)
    for _ in range(10):
        with torch.cuda.stream(other):
            for _ in range(20):
                busy @ busy
        got = forward_and_backward(lora_linear, given)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(got[1][name], expected[1][name]) for name in expected[1])


def test_under_deterministic_algorithms(device, monkeypatch):
    """The path is then chosen by the shape alone, and no op refuses."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    given = operands((600,), 256, 192, 16, BF16, dropout_p=0.1).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_and_backward(lora_linear, given) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
