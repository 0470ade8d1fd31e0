"""What Triton's compiler makes of its own kernels runs, is right, and raises no alarm."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import Machine, Output

ARCHITECTURES = pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])


def run(kernel, grid, *arguments, order="forward"):
    machine = Machine("h100" if kernel.arch == "sm_90a" else "a100", order=order)
    module = machine.load(kernel.ptx)
    try:
        scratch = [0] * (len(kernel.parameters) - len(arguments))
        block = 32 * kernel.num_warps
        return module.launch(kernel.entry, grid, block, *arguments, *scratch, shared=kernel.shared_bytes)
    finally:
        module.unload()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def within_bf16(y, exact, slack=0.0):
    return ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + slack).all()


@ARCHITECTURES
@pytest.mark.parametrize(
    ("name", "m", "n", "k"),
    [
        ("matmul", 128, 128, 128),
        ("matmul", 100, 72, 80),
        ("matmul_ragged", 67, 65, 37),
        ("matmul_ragged", 1, 1, 1),
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_matmul(triton_kernels, arch, name, m, n, k, order):
    kernel = triton_kernels[name, arch]
    a, b, c = random(m, k), random(n, k, seed=1), torch.empty(m, n, dtype=torch.bfloat16)
    run(kernel, (-(-m // 64), -(-n // 64)), a, b, Output(c), m, n, k, k, k, n, order=order).assert_clean()
    exact = a.double() @ b.double().T
    assert within_bf16(c, exact, slack=2.0**-20 * float((a.double().abs() @ b.double().abs().T).max()))


@ARCHITECTURES
@pytest.mark.parametrize("columns", [1, 100, 777, 1024])
def test_softmax(triton_kernels, arch, columns):
    x, y = random(3, columns), torch.empty(3, columns, dtype=torch.bfloat16)
    run(triton_kernels["softmax", arch], 3, x, Output(y), columns, columns, columns).assert_clean()
    assert within_bf16(y, torch.softmax(x.double(), dim=1), slack=1e-6)


@ARCHITECTURES
@pytest.mark.parametrize("columns", [16, 576, 1536])
def test_layer_norm(triton_kernels, arch, columns):
    x, weight, bias = random(4, columns), random(columns, seed=1), random(columns, seed=2)
    y = torch.empty(4, columns, dtype=torch.bfloat16)
    mean, rstd = torch.empty(4), torch.empty(4)
    outputs = (Output(y), Output(mean), Output(rstd))
    run(
        triton_kernels["layer_norm", arch], 4, x, weight, bias, *outputs, columns, columns, columns, 1e-5
    ).assert_clean()
    exact = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
    assert within_bf16(y, exact, slack=1e-5)
    torch.testing.assert_close(mean.double(), x.double().mean(1), atol=1e-6, rtol=1e-6)
