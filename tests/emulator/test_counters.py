"""Access patterns of textbooks, whose sectors and wavefronts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine, Output
from tests.emulator.toolchain import compile_ptx

SOURCE = Path(__file__).parent / "kernels" / "checks.cu"


def launch(kernel, grid, block, *arguments, **options):
    module = Machine("a100").load(compile_ptx(SOURCE))
    return module.launch(kernel, grid, block, *arguments, **options).assert_clean().only


def read_strided(stride, offset):
    data = np.zeros(32 * 32 + 1, np.float32)
    return launch(
        "copy_strided", 1, 32, data, Output(np.zeros(32, np.float32)), stride, offset, names=["in", "out"]
    )


# A warp's 32 floats are 128 bytes: four sectors of 32 where they are contiguous and aligned.
@pytest.mark.parametrize(
    ("stride", "offset", "sectors", "ideal"),
    [(1, 0, 4, 4), (1, 1, 5, 4), (1, 8, 4, 4), (2, 0, 8, 4), (8, 0, 32, 4), (32, 0, 32, 4), (0, 0, 1, 1)],
    ids=["coalesced", "off by 4 bytes", "off by a sector", "stride 2", "stride 8", "stride 32", "broadcast"],
)
def test_sectors(stride, offset, sectors, ideal):
    run = read_strided(stride, offset)
    assert run.total("requests", "ld.global") == 1
    assert run.total("sectors", "ld.global") == sectors
    assert run.total("ideal_sectors", "ld.global") == ideal
    assert run.total("sectors", "st.global") == run.total("ideal_sectors", "st.global") == 4


def test_bytes_that_are_read_again_are_counted_once_among_the_unique():
    traffic = read_strided(0, 0).buffers["in"]
    assert (traffic.bytes_read, traffic.unique_read, traffic.bytes_written) == (128, 4, 0)
    traffic = read_strided(2, 0).buffers
    assert (traffic["in"].bytes_read, traffic["in"].unique_read) == (128, 128)
    assert (traffic["out"].bytes_written, traffic["out"].unique_written, traffic["out"].bytes_read) == (
        128,
        128,
        0,
    )


# 32 banks of 4 bytes: lanes conflict where stride · lane is the same modulo 32.
@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1)], ids=str
)
def test_bank_conflicts(stride, wavefronts):
    run = launch("shared_strided", 1, 32, Output(np.zeros(32, np.int32)), stride, shared=4 * 32 * 33)
    # The compiler may keep the value in its register: the store alone is certain.
    assert run.total("shared_requests", "st.shared") == 1
    assert run.total("wavefronts", "st.shared") == wavefronts
    assert run.total("ideal_wavefronts", "st.shared") == 1


def test_a_word_for_all_lanes_is_one_wavefront():
    run = launch("shared_broadcast", 1, 32, Output(np.zeros(32, np.int32)), shared=128)
    assert run.total("wavefronts", "ld.shared") == run.total("ideal_wavefronts", "ld.shared") == 1


def test_128_bits_a_lane_are_four_wavefronts():
    run = launch("shared_vectors", 1, 32, Output(np.zeros(128, np.int32)), shared=512)
    assert run.total("wavefronts", "st.shared") == run.total("ideal_wavefronts", "st.shared") == 4


@pytest.mark.parametrize(("pitch", "conflicts"), [(32, 32), (33, 1)], ids=["unpadded", "padded"])
def test_a_transpose_wants_padding(pitch, conflicts):
    data = np.arange(1024, dtype=np.int32)
    out = np.zeros(1024, np.int32)
    run = launch("transpose", 1, 1024, data, Output(out), pitch, shared=4 * 32 * pitch)
    assert (out.reshape(32, 32) == data.reshape(32, 32).T).all()
    assert run.total("wavefronts", "st.shared") == 32
    assert run.total("wavefronts", "ld.shared") == 32 * conflicts
    assert run.total("ideal_wavefronts", "ld.shared") == 32


# Each of the four matrices has eight rows of 16 bytes: 128 bytes, all in four banks unless swizzled.
@pytest.mark.parametrize(("swizzled", "wavefronts"), [(0, 32), (1, 4)], ids=["plain", "swizzled"])
def test_ldmatrix_wants_a_swizzle(swizzled, wavefronts):
    run = launch("load_matrices", 1, 32, Output(np.zeros(32, np.int32)), swizzled, shared=4096)
    assert run.total("wavefronts", "ldmatrix") == wavefronts
    assert run.total("ideal_wavefronts", "ldmatrix") == 4


def test_instructions_are_counted_by_warp_and_lanes_by_thread():
    out = np.zeros(48, np.float32)
    data = np.zeros(48, np.float32)
    module = Machine("a100").load(compile_ptx(SOURCE))
    run = module.launch("copy_strided", 3, 48, data, Output(out), 1, 0).only
    assert run.grid == (3, 1, 1)
    assert run.block == (48, 1, 1)
    # Three blocks of a full warp and a half.
    loads = [step for step in run.steps if step.opcode.startswith("ld.global")]
    assert [(s.executed, s.lanes, s.requests) for s in loads] == [(6, 144, 6)]
    assert run.instructions["ret"] == 6
    assert sum(run.instructions.values()) == sum(step.executed for step in run.steps)
    assert run.total("executed", "ld.param") == 6 * 4


def test_each_launch_is_counted_on_its_own():
    machine = Machine("a100")
    module = machine.load(compile_ptx(SOURCE))
    out = np.zeros(32, np.float32)
    with machine.buffers(x=np.ones(32, np.float32), y=out) as placed:
        totals = [
            module.launch("copy_strided", 1, 32, placed["x"], placed["y"], 1, 0).only.buffers["x"].bytes_read
            for _ in range(2)
        ]
    assert totals == [128, 128]
    assert (out == 1).all()
