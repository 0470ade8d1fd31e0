"""The stand-in CUDA runtime: allocations, copies and fills."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.emulator import Machine
from tests.emulator.cuda_runtime import CudaError, last_message, reset, runtime

HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)
UNREGISTERED, HOST, DEVICE = range(3)  # cudaMemoryType


class PointerAttributes(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_uint64),
        ("host_pointer", ctypes.c_uint64),
        ("reserved", ctypes.c_long * 8),
    ]


@pytest.fixture(scope="module")
def cuda():
    return runtime()


@pytest.fixture(autouse=True)
def machine():
    yield Machine("a100")
    reset()


@pytest.fixture
def allocate(cuda):
    """cudaMalloc, undone at the end of the test."""
    pointers = []

    def allocate(count):
        pointer = ctypes.c_uint64()
        assert cuda.cudaMalloc(ctypes.byref(pointer), count) == CudaError.SUCCESS
        pointers.append(pointer.value)
        return pointer.value

    yield allocate
    for pointer in pointers:
        cuda.cudaFree(pointer)


def memory_info(cuda):
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == CudaError.SUCCESS
    return free.value, total.value


def fetch(cuda, pointer, count):
    out = np.zeros(count, np.uint8)
    assert cuda.cudaMemcpy(out.ctypes.data, pointer, count, DEVICE_TO_HOST) == CudaError.SUCCESS
    return out


def test_allocations_are_aligned_and_counted(cuda, machine):
    before, total = memory_info(cuda)
    assert total == machine.device.global_memory_bytes
    pointer = ctypes.c_uint64()
    for call in ("cudaMalloc", "cudaMallocAsync"):
        stream = () if call == "cudaMalloc" else (0,)
        assert getattr(cuda, call)(ctypes.byref(pointer), 1000, *stream) == CudaError.SUCCESS
        assert pointer.value % 256 == 0
        assert memory_info(cuda) == (before - 1000, total)
        assert getattr(cuda, call.replace("Malloc", "Free"))(pointer, *stream) == CudaError.SUCCESS
        assert memory_info(cuda) == (before, total)


def test_memory_runs_out(cuda, machine):
    pointer = ctypes.c_uint64(1)
    free, _ = memory_info(cuda)
    assert cuda.cudaMalloc(ctypes.byref(pointer), free + 1) == CudaError.MEMORY_ALLOCATION
    assert pointer.value == 0
    assert cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(2**64 - 1)) == CudaError.MEMORY_ALLOCATION
    assert cuda.cudaMallocHost(ctypes.byref(pointer), 2**60) == CudaError.MEMORY_ALLOCATION
    assert cuda.cudaMalloc(ctypes.byref(pointer), 1024) == CudaError.SUCCESS
    cuda.cudaFree(pointer)


def test_nothing_is_allocated_for_zero_bytes(cuda):
    pointer = ctypes.c_uint64(1)
    assert cuda.cudaMalloc(ctypes.byref(pointer), 0) == CudaError.SUCCESS
    assert pointer.value == 0
    assert cuda.cudaFree(0) == CudaError.SUCCESS
    assert cuda.cudaFreeHost(0) == CudaError.SUCCESS


def test_freeing_what_is_no_allocation(cuda, allocate):
    pointer = allocate(64)
    assert cuda.cudaFree(pointer + 16) == CudaError.INVALID_VALUE
    assert cuda.cudaFree(pointer) == CudaError.SUCCESS
    assert cuda.cudaFree(pointer) == CudaError.INVALID_VALUE
    assert cuda.cudaFreeHost(pointer) == CudaError.INVALID_VALUE


@pytest.mark.parametrize("asynchronous", [False, True])
def test_copies_there_and_back(cuda, allocate, asynchronous):
    source, there, back = np.arange(100, dtype=np.uint8), allocate(100), np.zeros(100, np.uint8)
    other = allocate(100)

    def copy(to, from_, kind):
        call, stream = (cuda.cudaMemcpyAsync, (0,)) if asynchronous else (cuda.cudaMemcpy, ())
        assert call(to, from_, 100, kind, *stream) == CudaError.SUCCESS

    copy(there, source.ctypes.data, HOST_TO_DEVICE)
    copy(other, there, DEFAULT)
    copy(back.ctypes.data, other, DEFAULT)
    np.testing.assert_array_equal(back, source)
    back[:] = 0
    copy(back.ctypes.data, source.ctypes.data, HOST_TO_HOST)
    np.testing.assert_array_equal(back, source)


def test_pitched_copies(cuda, allocate):
    source = np.arange(48, dtype=np.uint8).reshape(4, 12)
    there, back = allocate(4 * 16), np.zeros((4, 8), np.uint8)
    cuda.cudaMemset(there, 0xAA, 64)
    error = cuda.cudaMemcpy2D(there, 16, source.ctypes.data, 12, 10, 4, HOST_TO_DEVICE)
    assert error == CudaError.SUCCESS
    rows = fetch(cuda, there, 64).reshape(4, 16)
    np.testing.assert_array_equal(rows[:, :10], source[:, :10])
    assert (rows[:, 10:] == 0xAA).all()
    error = cuda.cudaMemcpy2DAsync(back.ctypes.data, 8, there + 2, 16, 8, 4, DEVICE_TO_HOST, 0)
    assert error == CudaError.SUCCESS
    np.testing.assert_array_equal(back, source[:, 2:10])


def test_a_pitch_smaller_than_the_width(cuda, allocate):
    there, row = allocate(256), np.zeros(64, np.uint8)
    for pitches in ((8, 16), (16, 8)):
        error = cuda.cudaMemcpy2D(there, pitches[0], row.ctypes.data, pitches[1], 9, 2, HOST_TO_DEVICE)
        assert error == CudaError.INVALID_PITCH_VALUE
    assert cuda.cudaMemset2D(there, 8, 0, 9, 2) == CudaError.INVALID_PITCH_VALUE


def test_fills(cuda, allocate):
    pointer = allocate(64)
    assert cuda.cudaMemset(pointer, 0x1FF, 64) == CudaError.SUCCESS  # the low byte is what counts
    assert cuda.cudaMemset2DAsync(pointer + 1, 16, 7, 3, 4, 0) == CudaError.SUCCESS
    expected = np.full((4, 16), 0xFF, np.uint8)
    expected[:, 1:4] = 7
    np.testing.assert_array_equal(fetch(cuda, pointer, 64).reshape(4, 16), expected)


@pytest.mark.parametrize(("offset", "count"), [(0, 65), (-1, 2), (64, 1), (1 << 23, 4)])
def test_a_range_outside_of_an_allocation(cuda, allocate, offset, count):
    pointer, host = allocate(64) + offset, np.zeros(100, np.uint8)
    errors = {
        cuda.cudaMemcpy(pointer, host.ctypes.data, count, HOST_TO_DEVICE),
        cuda.cudaMemcpy(host.ctypes.data, pointer, count, DEVICE_TO_HOST),
        cuda.cudaMemcpy(pointer, pointer, count, DEVICE_TO_DEVICE),
        cuda.cudaMemset(pointer, 0, count),
    }
    assert errors == {CudaError.INVALID_VALUE}


def test_rows_outside_of_an_allocation(cuda, allocate):
    pointer, host = allocate(64), np.zeros(100, np.uint8)
    copy = cuda.cudaMemcpy2D
    assert copy(pointer, 20, host.ctypes.data, 4, 4, 4, HOST_TO_DEVICE) == CudaError.SUCCESS
    assert copy(pointer, 20, host.ctypes.data, 5, 5, 4, HOST_TO_DEVICE) == CudaError.INVALID_VALUE
    assert "65 bytes from here" in last_message()
    huge = ctypes.c_size_t(2**63)  # the rows' extent overflows 64 bits
    assert copy(pointer, huge, host.ctypes.data, huge, 4, 3, HOST_TO_DEVICE) == CudaError.INVALID_VALUE


def test_a_copy_in_another_direction_than_its_kind(cuda, allocate):
    pointer, host = allocate(64), np.zeros(64, np.uint8).ctypes.data
    assert cuda.cudaMemcpy(pointer, host, 64, DEVICE_TO_HOST) == CudaError.INVALID_VALUE
    assert cuda.cudaMemcpy(host, pointer, 64, HOST_TO_DEVICE) == CudaError.INVALID_VALUE
    assert cuda.cudaMemcpy(host, pointer, 64, HOST_TO_HOST) == CudaError.INVALID_VALUE
    assert cuda.cudaMemcpy(host, pointer, 64, 5) == CudaError.INVALID_MEMCPY_DIRECTION
    assert cuda.cudaMemcpy(pointer, None, 64, HOST_TO_DEVICE) == CudaError.INVALID_VALUE
    assert last_message().endswith("src is null")


def test_what_a_pointer_points_to(cuda, allocate):
    attributes, host = PointerAttributes(), ctypes.c_uint64()

    def of(pointer):
        error = cuda.cudaPointerGetAttributes(ctypes.byref(attributes), pointer)
        assert error == CudaError.SUCCESS
        return attributes.type, attributes.device, attributes.device_pointer, attributes.host_pointer

    device = allocate(64) + 63
    assert of(device) == (DEVICE, 0, device, 0)
    assert cuda.cudaHostAlloc(ctypes.byref(host), 64, 0) == CudaError.SUCCESS
    assert of(host.value + 63) == (HOST, 0, 0, host.value + 63)
    assert cuda.cudaFreeHost(host) == CudaError.SUCCESS
    assert of(host.value)[0] == UNREGISTERED
    assert of(ctypes.addressof(host))[:2] == (UNREGISTERED, -2)


def test_mapped_host_memory_is_refused(cuda):
    pointer, mapped = ctypes.c_uint64(), 2
    assert cuda.cudaHostAlloc(ctypes.byref(pointer), 64, mapped) == CudaError.NOT_SUPPORTED
