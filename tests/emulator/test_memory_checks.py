"""Accesses outside what was passed, and misaligned ones, are found where they happen and named in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine, Output
from tests.emulator.toolchain import compile_ptx

SOURCE = Path(__file__).parent / "kernels" / "checks.cu"
TABLE = np.arange(4, dtype=np.int32).tobytes()


def launch(kernel, block, *arguments, **options):
    return Machine("a100").load(compile_ptx(SOURCE)).launch(kernel, 1, block, *arguments, **options)


def read(view, index, threads=1):
    """out[t] = memory[index + t], in floats from the view's first element."""
    out = np.zeros(threads, np.float32)
    return launch("read_at", threads, view, Output(out), index, names=["in", "out"]), out


def matrix():
    return np.arange(80, dtype=np.float32).reshape(8, 10)


def assert_outside(result, offset, buffer="in"):
    (finding,) = result.findings
    assert (finding.check, finding.buffer, finding.offset) == ("out of bounds", buffer, offset)
    return finding


def test_a_finding_names_everything():
    result = launch(
        "read_at", (2, 4), np.zeros(5, np.float32), Output(np.zeros(8, np.float32)), 4, names=["in", "out"]
    )
    ptx = compile_ptx(SOURCE).read_text().splitlines()
    # Threads 0 and 1 of x read elements 4 and 5, in each of four rows, which then write the same places.
    (finding,) = [f for f in result.findings if f.check == "out of bounds"]
    assert (finding.buffer, finding.offset) == ("in", 20)
    assert finding.kernel == "read_at"
    assert finding.ptx_text.startswith("ld.global")
    assert ptx[finding.ptx_line - 1].split() == f"{finding.ptx_text};".split()
    assert Path(finding.cuda_file).name == "checks.cu"
    assert "in[index + threadIdx.x]" in SOURCE.read_text().splitlines()[finding.cuda_line - 1]
    assert (finding.block, finding.thread, finding.warp, finding.lane) == ((0, 0, 0), (1, 0, 0), 0, 1)
    assert finding.count == 4
    assert "reads 4 bytes at byte 20 of `in` (20 bytes)" in finding.message


@pytest.mark.parametrize("index", [-1, 80, 4 * 10**9, -4 * 10**9])
def test_outside_the_buffer(index):
    result, out = read(matrix(), index)
    # Between two buffers the nearer one is named: far away it may be another.
    (finding,) = result.findings
    assert finding.check == "out of bounds"
    assert out[0] == 0
    if abs(index) < 100:
        assert (finding.buffer, finding.offset) == ("in", 4 * index)


def test_the_last_element_and_the_first_are_inside():
    for index in (0, 79):
        result, out = read(matrix(), index)
        result.assert_clean()
        assert out[0] == index


@pytest.mark.parametrize(
    ("index", "inside"), [(3, True), (4, False), (9, False), (10, True), (73, True), (74, False)]
)
def test_the_gaps_between_a_views_rows(index, inside):
    result, out = read(matrix()[:, :4], index)
    if inside:
        result.assert_clean()
        assert out[0] == index
    else:
        assert_outside(result, 4 * index)


@pytest.mark.parametrize(("index", "inside"), [(0, True), (-1, True), (-9, True), (1, False), (-10, False)])
def test_a_view_of_negative_stride(index, inside):
    view = np.arange(10, dtype=np.float32)[::-1]
    result, out = read(view, index)
    if inside:
        result.assert_clean()
        assert out[0] == view[-index]
    else:
        assert result.kinds() == {"out of bounds"}


@pytest.mark.parametrize(
    ("index", "inside"), [(0, True), (2, True), (3, False), (10, True), (13, False), (72, True)]
)
def test_a_transposed_view(index, inside):
    result, _ = read(matrix()[:, :3].T, index)
    assert result.kinds() == (set() if inside else {"out of bounds"})


def test_every_second_element():
    view = np.arange(10, dtype=np.float32)[::2]
    assert read(view, 8)[0].kinds() == set()
    assert_outside(read(view, 7)[0], 28)


def test_an_empty_view():
    assert read(np.zeros((0, 4), np.float32), 0)[0].kinds() == {"out of bounds"}


def test_a_read_of_the_neighbouring_row_that_leaves_the_output_correct():
    out = np.zeros(8, np.float32)
    arguments = (matrix()[:, :4], Output(out), 10)
    result = launch("row_sums", 8, *arguments, 5, 4, names=["in", "out"])
    assert (out == matrix()[:, :4].sum(1)).all()
    finding = assert_outside(result, 16)
    assert finding.count == 8
    assert "outside the view that was passed" in finding.message
    launch("row_sums", 8, *arguments, 4, 4).assert_clean()


def test_writes_outside_do_not_happen():
    base = np.zeros((4, 4), np.float32)
    result = launch("write_at", 4, base[:, :2], 0, names=["out"])
    assert_outside(result, 8, "out")
    assert base.sum() == 2
    assert (base[0] == [1, 1, 0, 0]).all()


def test_static_shared_memory():
    launch("static_shared_at", 64, Output(np.zeros(64, np.int32)), 0).assert_clean()
    result = launch("static_shared_at", 64, Output(np.zeros(64, np.int32)), 60)
    (finding,) = result.findings
    assert finding.check == "out of bounds"
    assert finding.count == 60
    assert f"tile` + {4 * (60 + finding.thread[0])}, outside the block's" in finding.message
    assert finding.thread[0] == 32 * finding.warp + finding.lane >= 4


@pytest.mark.parametrize(("bytes_", "clean"), [(256, True), (252, False), (128, False), (0, False)])
def test_dynamic_shared_memory_ends_where_the_launch_says(bytes_, clean):
    result = launch("dynamic_shared_at", 64, Output(np.zeros(64, np.int32)), 0, shared=bytes_)
    assert ("out of bounds" not in result.kinds()) == clean
    if clean:
        result.assert_clean()


def test_local_memory():
    out = np.zeros(1, np.int32)
    launch("local_at", 1, Output(out), 8, 7).assert_clean()
    assert out[0] == 7
    for index in (8, -5, 1 << 20):
        (finding,) = launch("local_at", 1, Output(out), 8, index).findings
        assert finding.check == "out of bounds"
        assert "local memory" in finding.message


def test_parameters():
    out = np.zeros(1, np.int32)
    launch("parameter_at", 1, TABLE, Output(out), 3).assert_clean()
    assert out[0] == 3
    (finding,) = launch("parameter_at", 1, TABLE, Output(out), 1000).findings
    assert finding.check == "out of bounds"
    assert "bytes of parameters" in finding.message


@pytest.mark.parametrize("index", range(4))
def test_vectors_must_be_aligned(index):
    out = np.zeros(4, np.float32)
    result = launch(
        "read_vector_at", 1, np.arange(8, dtype=np.float32), Output(out), index, names=["in", "out"]
    )
    if index == 0:
        result.assert_clean()
        assert (out == np.arange(4)).all()
        return
    (finding,) = result.findings
    assert (finding.check, finding.buffer, finding.offset) == ("misaligned", "in", 4 * index)
    assert "not a multiple of 16" in finding.message


def test_a_view_keeps_the_alignment_that_it_has():
    view = np.arange(9, dtype=np.float32)[1:]
    assert launch("read_vector_at", 1, view, Output(np.zeros(4, np.float32)), 0).kinds() == {"misaligned"}
    launch("read_vector_at", 1, view, Output(np.zeros(4, np.float32)), 3).assert_clean()


@pytest.mark.parametrize("skew", [1, 3])
def test_an_aligned_access_anywhere_in_a_long_view(skew):
    view = np.arange(1 << 13, dtype=np.float32)[skew:]
    for index in range(4 - skew, len(view) - 3, 508):
        out = np.zeros(4, np.float32)
        launch("read_vector_at", 1, view, Output(out), index).assert_clean()
        assert (out == view[index : index + 4]).all()


@pytest.mark.parametrize("address", [0, 16, 1 << 40])
def test_null_and_wild_pointers(address):
    result = launch("read_at", 1, address, Output(np.zeros(1, np.float32)), 0)
    assert result.kinds() == {"out of bounds"}
    assert launch("write_at", 1, address, 0).kinds() == {"out of bounds"}


ROW, STRIDE = 70_000, 40_000


def huge_write(kernel):
    machine = Machine("a100")
    pointer = machine.allocate(4 * (ROW * STRIDE + 1), "huge")
    try:
        return machine.load(compile_ptx(SOURCE)).launch(kernel, 1, 1, pointer, ROW, STRIDE)
    finally:
        machine.free(pointer)


def test_more_elements_than_32_bits_count():
    assert ROW * STRIDE > 2**31
    result = huge_write("wide_index").assert_clean()
    assert result.only.buffers["huge"].unique_written == 4


def test_an_index_that_overflows_32_bits():
    (finding,) = huge_write("narrow_index").findings
    assert finding.check == "out of bounds"
