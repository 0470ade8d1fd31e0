"""CUTLASS's kernels, which nobody here wrote, run unmodified, are right, and raise no alarm."""

from __future__ import annotations

import time

import pytest
import torch

from tests.emulator import Machine
from tests.emulator.mutations import registered_ptx
from tests.emulator.oracles.cutlass import GEMMS
from tests.emulator.oracles.run import Operands, run_gemm
from tests.emulator.static_report import static_report

# Half a unit in the last place of the output, and what fp32 accumulation in any order may lose.
OUTPUT_ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 0.0}
ACCUMULATION = 2.0**-20

BY_NAME = pytest.mark.parametrize("gemm", GEMMS, ids=lambda gemm: gemm.launcher.removeprefix("cutlass_"))


def device_of(gemm):
    return "h100" if gemm.arch == "sm_90a" else "a100"


def assert_right(gemm, d, operands, *, slices=1):
    error = (d.double() - operands.exact).abs()
    # Serial split-K rounds each slice's sum to the output's type.
    rounding = OUTPUT_ROUNDING[gemm.output] * slices
    bound = rounding * operands.magnitude.clamp(min=operands.exact.abs()) + ACCUMULATION * operands.magnitude
    tight = (rounding * operands.exact.abs() + ACCUMULATION * operands.magnitude) if slices == 1 else bound
    assert (error <= tight).all(), (error / operands.magnitude).max()


def ragged(gemm):
    """Sizes that fill no tile, as uneven as the launcher's alignment admits."""
    a = gemm.alignment
    return (200 // a * a + a, 136 // a * a + a, 104 // a * a + a)


@BY_NAME
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_ragged_products_are_right_and_clean(gemm, order, launchers):
    operands = Operands(gemm, *ragged(gemm))
    machine = Machine(device_of(gemm), order=order, seed=3)
    slices = 3 if gemm.splits_k else 1
    d, result = run_gemm(machine, launchers(gemm.arch), gemm, operands, slices=slices)
    result.assert_clean()
    assert_right(gemm, d, operands, slices=slices)


@BY_NAME
def test_small_products_are_right_and_clean(gemm, launchers):
    operands = Operands(gemm, gemm.alignment, gemm.alignment, gemm.alignment)
    d, result = run_gemm(Machine(device_of(gemm)), launchers(gemm.arch), gemm, operands)
    result.assert_clean()
    assert_right(gemm, d, operands)


@pytest.mark.parametrize("gemm", [g for g in GEMMS if g.splits_k], ids=lambda gemm: gemm.launcher)
def test_the_order_of_blocks_does_not_change_a_split_product(gemm, launchers):
    operands = Operands(gemm, 128, 128, 256)
    results = [
        run_gemm(Machine("a100", order=order, seed=1), launchers(gemm.arch), gemm, operands, slices=4)[0]
        for order in ("forward", "reverse", "random")
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_large_product_with_every_check_is_quick(launchers):
    gemm = GEMMS[0]
    operands = Operands(gemm, 512, 512, 512)
    times = []
    for _ in range(3):
        begin = time.process_time()
        d, result = run_gemm(Machine("a100"), launchers(gemm.arch), gemm, operands)
        times.append(time.process_time() - begin)
        result.assert_clean()
    assert_right(gemm, d, operands)
    assert min(times) < 1.0, times


@BY_NAME
def test_truncating_tensor_cores_stay_within_their_rule(gemm, launchers):
    operands = Operands(gemm, 128, 128, 256)
    run = {
        truncating: run_gemm(
            Machine(device_of(gemm), truncating=truncating), launchers(gemm.arch), gemm, operands
        )[0]
        for truncating in (False, True)
    }
    # Truncation loses up to 2^-23 of the largest term at each of k/8 additions; both are still sums in fp32.
    difference = (run[True].double() - run[False].double()).abs()
    bound = (256 / 4) * 2.0**-23 * operands.magnitude + 2 * OUTPUT_ROUNDING[
        gemm.output
    ] * operands.exact.abs()
    assert (difference <= bound).all()
    if gemm.output == "f32":
        assert (difference > 0).any()


@pytest.mark.parametrize("device", ["a100", "l4", "rtx5090"])
def test_one_launcher_serves_every_device_of_its_architecture_or_newer(device, launchers):
    gemm = GEMMS[0]
    operands = Operands(gemm, 128, 128, 64)
    d, result = run_gemm(Machine(device), launchers(gemm.arch), gemm, operands)
    result.assert_clean()
    assert_right(gemm, d, operands)


def test_aligned_products_waste_no_sector_and_have_no_bank_conflict_in_ldmatrix(launchers):
    gemm = GEMMS[0]
    _, result = run_gemm(Machine("a100"), launchers(gemm.arch), gemm, Operands(gemm, 256, 256, 128))
    launch = result.assert_clean().only
    assert launch.total("sectors", "cp.async") == launch.total("ideal_sectors", "cp.async") > 0
    assert launch.total("wavefronts", "ldmatrix") == launch.total("ideal_wavefronts", "ldmatrix") > 0
    # 16·8·16 multiply-adds an instruction; each operand is read once by every block that needs it.
    mma = sum(n for opcode, n in launch.instructions.items() if opcode.startswith("mma."))
    assert mma == 256 * 256 * 128 // (16 * 8 * 16)
    assert launch.buffers["a"].unique_read == 256 * 128 * 2
    assert launch.buffers["a"].bytes_read == 2 * 256 * 128 * 2
    assert launch.buffers["d"].unique_written == launch.buffers["d"].bytes_written == 256 * 256 * 2


def test_the_main_loop_of_cutlass_has_the_mix_that_ours_is_held_to(launchers, tmp_path):
    gemm = GEMMS[0]  # 128×128×32, 3 stages, warps of 64×64
    _, result = run_gemm(Machine("a100"), launchers(gemm.arch), gemm, Operands(gemm, 128, 128, 64))
    kernel = result.only.kernel
    path = tmp_path / "cutlass.ptx"
    path.write_text(registered_ptx(kernel))
    report = next(r for r in static_report(path, arch="sm_80") if r.name == kernel)
    loop = report.main_loop
    assert (loop.matrix, loop.shared_loads, loop.async_copies) == (64, 16, 8)
    assert loop.others_per_matrix < 1.25
    assert report.resources.spill_stores == report.resources.spill_loads == 0
