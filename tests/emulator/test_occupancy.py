"""Occupancy, by hand and against the calculator that the CUDA toolkit carries."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from tests.emulator.devices import DEVICES, device
from tests.emulator.occupancy import Occupancy, occupancy
from tests.emulator.toolchain import find_toolkit

A100, H100, L4, RTX4090, B200, RTX5090 = DEVICES.values()


def test_a_device_that_the_table_lacks_is_an_error():
    assert device("a100") is A100
    with pytest.raises(ValueError, match=r"device must be one of a100, h100, .*, got 'v100'"):
        device("v100")


def test_registers_limit_a_gemm_of_230_registers():
    """230 × 32 = 7360, in units of 256: 7424 a warp. A quarter of the registers, 16384, holds two warps and
    the SM eight, which is two blocks of four. Shared memory, 48 KiB + 1 KiB of 164 KiB, would hold three, and
    of the 100 KiB that an L4 has, two as well.
    """
    assert occupancy(A100, 128, 230, 48 << 10) == Occupancy(2, 8, 8 / 64, ("registers",))
    assert occupancy(L4, 128, 230, 48 << 10) == Occupancy(2, 8, 8 / 48, ("registers", "shared memory"))


def test_warps_limit_large_blocks():
    """Two blocks of 32 warps fill the A100's 64; of the RTX 4090's 48 they leave a third."""
    assert occupancy(A100, 1024, 32, 0) == Occupancy(2, 64, 1.0, ("warps", "registers"))
    assert occupancy(RTX4090, 1024, 32, 0) == Occupancy(1, 32, 32 / 48, ("warps",))
    assert occupancy(A100, 1025, 32, 0) == Occupancy(0, 0, 0.0, ("warps",))


def test_blocks_limit_small_ones():
    assert occupancy(H100, 20, 16, 0) == Occupancy(32, 32, 0.5, ("blocks",))
    assert occupancy(RTX5090, 20, 16, 0) == Occupancy(24, 24, 0.5, ("blocks",))


def test_a_warp_takes_its_registers_from_one_quarter_of_the_sm():
    """136 × 32 = 4352: 65536 would hold 15 such warps, but each quarter of 16384 only three."""
    assert occupancy(A100, 32, 136, 0).blocks == 12


def test_a_block_whose_warps_do_not_fit_the_quarters_cannot_be_launched():
    """Nine warps of 200 × 32 = 6400 need 57600 registers of 65536, but no quarter of 16384 holds a third."""
    assert occupancy(A100, 9 * 32, 200, 0) == Occupancy(0, 0, 0.0, ("registers",))
    assert occupancy(A100, 8 * 32, 200, 0).blocks == 1
    assert occupancy(A100, 32, 256, 0) == Occupancy(0, 0, 0.0, ("registers",))


def test_one_block_may_take_all_shared_memory_but_the_part_reserved():
    assert [it.shared_memory_per_block_optin >> 10 for it in DEVICES.values()] == [163, 227, 99, 99, 227, 99]
    for it in DEVICES.values():
        most = it.shared_memory_per_block_optin
        assert occupancy(it, 128, 64, most) == Occupancy(1, 4, 4 / it.max_warps_per_sm, ("shared memory",))
        assert occupancy(it, 128, 64, most + 1) == Occupancy(0, 0, 0.0, ("shared memory",))


def test_named_barriers_are_shared_by_the_blocks_from_compute_capability_9_on():
    """Blocks of 64 threads with 16 barriers each, of the 64 that an H100's SM has and the RTX 5090's 24."""
    assert occupancy(A100, 64, 16, 0, barriers=16).limited_by == ("blocks", "warps")
    assert occupancy(H100, 64, 16, 0, barriers=16) == Occupancy(4, 8, 8 / 64, ("barriers",))
    assert occupancy(RTX5090, 64, 16, 0, barriers=16) == Occupancy(1, 2, 2 / 48, ("barriers",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, 0), "threads must be at least 1, got 0"),
        ((32, 0, 0), "registers must be at least 1, got 0"),
        ((32, 32, -1), "shared_bytes must be at least 0, got -1"),
        ((32, 32, 0, -2), "barriers must be at least 0, got -2"),
    ],
)
def test_what_no_kernel_has_is_an_error(arguments, message):
    threads, registers, shared, *barriers = arguments
    with pytest.raises(ValueError, match=message):
        occupancy(A100, threads, registers, shared, **({"barriers": barriers[0]} if barriers else {}))


# The header asks the device for its sizes, and has the limits and units by compute capability itself. The
# limit on dynamic shared memory is what cudaFuncSetAttribute sets: a launcher opts in to what it needs.
CALCULATOR = """
#include <climits>
#include <cstdio>
#include <cstring>
#include <cuda_occupancy.h>

int main() {
  cudaOccDeviceProp device;
  cudaOccFuncAttributes kernel;
  cudaOccDeviceState state;
  int threads;
  kernel.maxThreadsPerBlock = INT_MAX;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  while (std::scanf("%d %d %d %d %d %d %d %zu %zu %d %zu %zu %d %d %zu %d", &device.computeMajor,
                    &device.computeMinor, &device.maxThreadsPerBlock, &device.maxThreadsPerMultiprocessor,
                    &device.regsPerBlock, &device.regsPerMultiprocessor, &device.warpSize,
                    &device.sharedMemPerBlock, &device.sharedMemPerMultiprocessor, &device.numSms,
                    &device.sharedMemPerBlockOptin, &device.reservedSharedMemPerBlock, &threads,
                    &kernel.numRegs, &kernel.maxDynamicSharedSizeBytes, &kernel.numBlockBarriers) == 16) {
    cudaOccResult result;
    const size_t shared = kernel.maxDynamicSharedSizeBytes;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return 1;
    std::printf("%d %u\\n", result.activeBlocksPerMultiprocessor, result.limitingFactors);
  }
}
"""
LIMITS = {"warps": 1, "registers": 2, "shared memory": 4, "blocks": 8, "barriers": 16}


@pytest.fixture(scope="module")
def calculator(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calculator")
    source, program = directory / "calculator.cpp", directory / "calculator"
    source.write_text(CALCULATOR)
    subprocess.run([find_toolkit().nvcc, "-cudart=none", source, "-o", program], check=True)
    return program


@pytest.mark.parametrize("name", DEVICES)
def test_agrees_with_the_toolkits_calculator(name, calculator):
    it = DEVICES[name]
    sizes = (
        *it.compute_capability,
        it.max_threads_per_block,
        it.max_threads_per_sm,
        it.registers_per_block,
        it.registers_per_sm,
        it.warp_size,
        it.shared_memory_per_block,
        it.shared_memory_per_sm,
        it.multiprocessors,
        it.shared_memory_per_block_optin,
        it.shared_memory_reserved_per_block,
    )
    threads = [1, 32, 33, 96, 128, 160, 256, 288, 384, 512, 640, 1024, 1025]
    registers = [1, 24, 32, 40, 64, 72, 96, 127, 128, 129, 168, 230, 255]
    shared = [0, 1, 1024, 9000, 20000, 32640, 32641, 49152, 50176, 99 << 10, 163 << 10, 227 << 10, 233472]
    cases = list(itertools.product(threads, registers, shared, [0, 1, 3, 16]))
    lines = "".join(" ".join(map(str, (*sizes, *case))) + "\n" for case in cases)
    output = subprocess.run([calculator], input=lines, capture_output=True, text=True, check=True).stdout
    for case, line in zip(cases, output.splitlines(), strict=True):
        ours = occupancy(it, *case[:3], barriers=case[3])
        blocks, limits = map(int, line.split())
        assert ours.blocks == blocks
        if ours.limited_by == ("barriers",):  # the header keeps the limits that barriers then fall below
            limits &= LIMITS["barriers"]
        assert sum(LIMITS[limit] for limit in ours.limited_by) == limits
