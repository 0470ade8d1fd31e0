"""The stand-in CUDA runtime: handles of streams and events, and the rules of stream capture."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine
from tests.emulator.cuda_runtime import CudaError, load_launchers, reset, runtime

BLOCKING, NON_BLOCKING = 0, 1
LEGACY, PER_THREAD = 1, 2  # cudaStreamLegacy, cudaStreamPerThread
GLOBAL, THREAD_LOCAL, RELAXED = range(3)  # cudaStreamCaptureMode
NONE, ACTIVE, INVALIDATED = range(3)  # cudaStreamCaptureStatus
HOST_TO_DEVICE = 1


@pytest.fixture(scope="module")
def cuda():
    return runtime()


@pytest.fixture(scope="module")
def launchers():
    return load_launchers([Path(__file__).parent / "kernels" / "runtime_launches.cu"], arch="sm_80")


@pytest.fixture(autouse=True)
def machine():
    yield Machine("a100")
    reset()


@pytest.fixture
def memory(cuda, machine):
    pointer = ctypes.c_uint64()
    cuda.cudaMalloc(ctypes.byref(pointer), 64)
    yield pointer.value
    reset()  # also ends captures, in which nothing can be freed
    cuda.cudaFree(pointer)


def make(call, *arguments):
    handle = ctypes.c_uint64()
    assert call(ctypes.byref(handle), *arguments) == CudaError.SUCCESS
    return handle.value


def new_stream(cuda, flags=NON_BLOCKING):
    return make(cuda.cudaStreamCreateWithFlags, flags)


def begin(cuda, mode=GLOBAL, flags=NON_BLOCKING):
    stream = new_stream(cuda, flags)
    assert cuda.cudaStreamBeginCapture(stream, mode) == CudaError.SUCCESS
    return stream


def status(cuda, stream):
    value = ctypes.c_int(-1)
    assert cuda.cudaStreamIsCapturing(stream, ctypes.byref(value)) == CudaError.SUCCESS
    return value.value


def end(cuda, stream):
    graph = ctypes.c_uint64(1)
    return cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)), graph.value


def first_byte(cuda, pointer):
    out = np.zeros(1, np.uint8)
    assert cuda.cudaMemcpy(out.ctypes.data, pointer, 1, 4) == CudaError.SUCCESS
    return out[0]


# ---- handles ----------------------------------------------------------------------------------------------


def test_streams(cuda):
    stream = make(cuda.cudaStreamCreateWithPriority, NON_BLOCKING, -2)
    value = ctypes.c_int()
    for call, expected in ((cuda.cudaStreamGetFlags, NON_BLOCKING), (cuda.cudaStreamGetPriority, -2)):
        assert call(stream, ctypes.byref(value)) == CudaError.SUCCESS
        assert value.value == expected
    for handle in (stream, 0, LEGACY, PER_THREAD):
        assert cuda.cudaStreamSynchronize(handle) == CudaError.SUCCESS
        assert cuda.cudaStreamQuery(handle) == CudaError.SUCCESS
    assert cuda.cudaStreamDestroy(stream) == CudaError.SUCCESS
    assert cuda.cudaStreamCreateWithFlags(ctypes.byref(value), 8) == CudaError.INVALID_VALUE


def test_handles_that_are_none(cuda, memory):
    destroyed, event = new_stream(cuda), make(cuda.cudaEventCreate)
    cuda.cudaStreamDestroy(destroyed)
    new_stream(cuda)  # does not get the old handle
    for stream in (destroyed, 0xABCD, event):
        errors = {
            cuda.cudaStreamSynchronize(stream),
            cuda.cudaStreamDestroy(stream),
            cuda.cudaMemsetAsync(memory, 0, 4, stream),
            cuda.cudaEventRecord(event, stream),
            cuda.cudaStreamBeginCapture(stream, GLOBAL),
        }
        assert errors == {CudaError.INVALID_RESOURCE_HANDLE}
    for default in (0, LEGACY, PER_THREAD):
        assert cuda.cudaStreamDestroy(default) == CudaError.INVALID_RESOURCE_HANDLE
    cuda.cudaEventDestroy(event)
    assert cuda.cudaEventQuery(event) == CudaError.INVALID_RESOURCE_HANDLE
    assert cuda.cudaGraphLaunch(destroyed, 0) == CudaError.INVALID_RESOURCE_HANDLE
    assert cuda.cudaGraphDestroy(destroyed) == CudaError.INVALID_RESOURCE_HANDLE
    assert cuda.cudaGraphExecDestroy(destroyed) == CudaError.INVALID_RESOURCE_HANDLE


def test_a_launch_into_a_destroyed_stream(cuda, launchers):
    stream = new_stream(cuda)
    cuda.cudaStreamDestroy(stream)
    p = (ctypes.c_uint64 * 3)(0, 0, 1 << 32)  # factor 0, one element
    assert launchers.launch_scale(ctypes.byref(p), 32, stream) == CudaError.INVALID_RESOURCE_HANDLE


def test_events(cuda):
    start, stop = make(cuda.cudaEventCreate), make(cuda.cudaEventCreateWithFlags, 0)
    stream, milliseconds = new_stream(cuda), ctypes.c_float(-1)
    elapsed = cuda.cudaEventElapsedTime
    assert cuda.cudaEventRecord(start, stream) == CudaError.SUCCESS
    assert elapsed(ctypes.byref(milliseconds), start, stop) == CudaError.INVALID_RESOURCE_HANDLE
    assert cuda.cudaEventRecord(stop, 0) == CudaError.SUCCESS
    assert cuda.cudaStreamWaitEvent(stream, stop, 0) == CudaError.SUCCESS
    assert cuda.cudaEventSynchronize(stop) == cuda.cudaEventQuery(stop) == CudaError.SUCCESS
    assert elapsed(ctypes.byref(milliseconds), start, stop) == CudaError.SUCCESS
    assert milliseconds.value == 0
    untimed = make(cuda.cudaEventCreateWithFlags, 2)
    cuda.cudaEventRecord(untimed, 0)
    assert elapsed(ctypes.byref(milliseconds), start, untimed) == CudaError.INVALID_RESOURCE_HANDLE


def test_reset_destroys_handles(cuda):
    stream, event = begin(cuda), make(cuda.cudaEventCreate)
    reset()
    assert cuda.cudaStreamQuery(stream) == CudaError.INVALID_RESOURCE_HANDLE
    assert cuda.cudaEventQuery(event) == CudaError.INVALID_RESOURCE_HANDLE
    assert cuda.cudaDeviceSynchronize() == CudaError.SUCCESS  # nothing captures any more


# ---- capture ----------------------------------------------------------------------------------------------


def test_a_graph_of_launches_replays(launchers, machine):
    source = np.arange(1, 33, dtype=np.float32)
    values, copy, nodes = np.zeros(32, np.float32), np.zeros(32, np.float32), ctypes.c_size_t()
    for times in (0, 1, 2):
        values[:], copy[:] = 5, 7
        with machine.buffers(values=values, source=source, copy=copy) as b:
            pointers = [b[name].pointer for name in ("values", "source", "copy")]
            result = machine.run(
                lambda p=pointers, n=times: launchers.capture(*p, 32, n, ctypes.byref(nodes))
            )
        assert result.assert_clean().value == CudaError.SUCCESS
        assert nodes.value == 4
        assert len(result.launches) == 2 * times
        np.testing.assert_array_equal(values, 6 * source if times else 5)
        np.testing.assert_array_equal(copy, 6 * source if times else 7)


def test_work_is_recorded_and_not_run(cuda, memory):
    cuda.cudaMemset(memory, 1, 64)
    stream = begin(cuda)
    assert status(cuda, stream) == ACTIVE
    assert cuda.cudaMemsetAsync(memory, 2, 64, stream) == CudaError.SUCCESS
    error, graph = end(cuda, stream)
    assert (error, status(cuda, stream)) == (CudaError.SUCCESS, NONE)
    assert first_byte(cuda, memory) == 1
    executable = make(cuda.cudaGraphInstantiate, graph, 0)
    assert cuda.cudaGraphDestroy(graph) == CudaError.SUCCESS
    assert cuda.cudaGraphLaunch(executable, stream) == CudaError.SUCCESS
    assert first_byte(cuda, memory) == 2


def test_a_graph_within_a_capture(cuda, memory):
    inner = begin(cuda)
    cuda.cudaMemsetAsync(memory, 3, 64, inner)
    executable = make(cuda.cudaGraphInstantiate, end(cuda, inner)[1], 0)
    cuda.cudaMemset(memory, 0, 64)
    outer = begin(cuda)
    assert cuda.cudaGraphLaunch(executable, outer) == CudaError.SUCCESS
    _, graph = end(cuda, outer)
    assert first_byte(cuda, memory) == 0
    assert cuda.cudaGraphLaunch(make(cuda.cudaGraphInstantiate, graph, 0), 0) == CudaError.SUCCESS
    assert first_byte(cuda, memory) == 3


def test_copies_of_page_locked_memory_are_captured(cuda, memory):
    host = make(cuda.cudaMallocHost, 64)
    ctypes.memset(host, 9, 64)
    stream = begin(cuda)
    assert cuda.cudaMemcpyAsync(memory, host, 64, HOST_TO_DEVICE, stream) == CudaError.SUCCESS
    executable = make(cuda.cudaGraphInstantiate, end(cuda, stream)[1], 0)
    ctypes.memset(host, 10, 64)  # what the graph reads when it is launched
    assert cuda.cudaGraphLaunch(executable, stream) == CudaError.SUCCESS
    assert first_byte(cuda, memory) == 10
    cuda.cudaFreeHost(host)


def synchronising_calls(cuda, stream, memory):
    """Calls that a stream which captures in the global mode forbids."""
    pointer, host = ctypes.c_uint64(), np.zeros(64, np.uint8)
    return {
        "stream": lambda: cuda.cudaStreamSynchronize(stream),
        "query": lambda: cuda.cudaStreamQuery(stream),
        "device": lambda: cuda.cudaDeviceSynchronize(),
        "default stream": lambda: cuda.cudaStreamSynchronize(0),
        "malloc": lambda: cuda.cudaMalloc(ctypes.byref(pointer), 64),
        "free": lambda: cuda.cudaFree(memory),
        "host alloc": lambda: cuda.cudaMallocHost(ctypes.byref(pointer), 64),
        "malloc async": lambda: cuda.cudaMallocAsync(ctypes.byref(pointer), 64, stream),
        "memcpy": lambda: cuda.cudaMemcpy(memory, host.ctypes.data, 64, HOST_TO_DEVICE),
        "pageable": lambda: cuda.cudaMemcpyAsync(memory, host.ctypes.data, 64, HOST_TO_DEVICE, stream),
    }


@pytest.mark.parametrize("name", synchronising_calls(None, 0, 0))
def test_a_call_that_may_synchronise_ends_a_capture(cuda, memory, name):
    stream = begin(cuda)
    assert synchronising_calls(cuda, stream, memory)[name]() == CudaError.STREAM_CAPTURE_UNSUPPORTED
    assert status(cuda, stream) == INVALIDATED
    assert cuda.cudaMemsetAsync(memory, 0, 4, stream) == CudaError.STREAM_CAPTURE_INVALIDATED
    assert end(cuda, stream) == (CudaError.STREAM_CAPTURE_INVALIDATED, 0)
    assert status(cuda, stream) == NONE
    assert cuda.cudaStreamSynchronize(stream) == CudaError.SUCCESS


@pytest.mark.parametrize("name", ["malloc", "host alloc", "memcpy", "default stream"])
def test_a_relaxed_capture_allows_other_calls(cuda, memory, name):
    stream = begin(cuda, RELAXED)
    assert synchronising_calls(cuda, stream, memory)[name]() == CudaError.SUCCESS
    assert end(cuda, stream)[0] == CudaError.SUCCESS


def test_a_relaxed_thread(cuda, memory):
    stream, mode, pointer = begin(cuda), ctypes.c_int(RELAXED), ctypes.c_uint64()
    exchange = cuda.cudaThreadExchangeStreamCaptureMode
    assert exchange(ctypes.byref(mode)) == CudaError.SUCCESS
    assert mode.value == GLOBAL
    assert cuda.cudaMalloc(ctypes.byref(pointer), 64) == CudaError.SUCCESS
    exchange(ctypes.byref(mode))
    assert mode.value == RELAXED
    assert cuda.cudaFree(pointer) == CudaError.STREAM_CAPTURE_UNSUPPORTED
    assert end(cuda, stream)[0] == CudaError.STREAM_CAPTURE_INVALIDATED
    cuda.cudaFree(pointer)


def in_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(
    ("mode", "allocation", "ending"),
    [
        (GLOBAL, CudaError.STREAM_CAPTURE_UNSUPPORTED, CudaError.STREAM_CAPTURE_WRONG_THREAD),
        (THREAD_LOCAL, CudaError.SUCCESS, CudaError.STREAM_CAPTURE_WRONG_THREAD),
        (RELAXED, CudaError.SUCCESS, CudaError.SUCCESS),
    ],
)
def test_captures_and_other_threads(cuda, mode, allocation, ending):
    stream, pointer = begin(cuda, mode), ctypes.c_uint64()
    assert in_thread(lambda: cuda.cudaMalloc(ctypes.byref(pointer), 64)) == allocation
    assert in_thread(lambda: end(cuda, stream)[0]) == ending
    reset()
    cuda.cudaFree(pointer)


def test_the_legacy_stream_during_a_blocking_capture(cuda, memory):
    stream, value = begin(cuda, RELAXED, BLOCKING), ctypes.c_int()
    implicit = CudaError.STREAM_CAPTURE_IMPLICIT
    assert cuda.cudaStreamIsCapturing(0, ctypes.byref(value)) == implicit
    assert status(cuda, stream) == ACTIVE  # asking does no harm
    other = new_stream(cuda)
    assert cuda.cudaMemsetAsync(memory, 0, 4, other) == CudaError.SUCCESS
    assert cuda.cudaMemsetAsync(memory, 0, 4, 0) == implicit
    assert status(cuda, stream) == INVALIDATED


def test_the_legacy_stream_during_another_capture(cuda, memory):
    stream = begin(cuda, RELAXED, NON_BLOCKING)
    assert cuda.cudaMemsetAsync(memory, 5, 4, LEGACY) == CudaError.SUCCESS
    assert status(cuda, 0) == NONE
    assert end(cuda, stream)[0] == CudaError.SUCCESS


def test_begin_and_end_out_of_turn(cuda):
    stream = begin(cuda)
    assert cuda.cudaStreamBeginCapture(stream, GLOBAL) == CudaError.ILLEGAL_STATE
    assert cuda.cudaStreamBeginCapture(0, GLOBAL) == CudaError.STREAM_CAPTURE_UNSUPPORTED
    assert cuda.cudaStreamBeginCapture(new_stream(cuda), 3) == CudaError.INVALID_VALUE
    assert end(cuda, stream)[0] == CudaError.SUCCESS
    assert end(cuda, stream)[0] == CudaError.ILLEGAL_STATE
    assert cuda.cudaStreamBeginCapture(PER_THREAD, GLOBAL) == CudaError.SUCCESS
    assert end(cuda, PER_THREAD)[0] == CudaError.SUCCESS


def test_events_and_captures(cuda):
    outside, inside = make(cuda.cudaEventCreate), make(cuda.cudaEventCreate)
    cuda.cudaEventRecord(outside, 0)
    stream = begin(cuda)
    assert cuda.cudaEventRecord(inside, stream) == CudaError.SUCCESS
    assert cuda.cudaStreamWaitEvent(stream, inside, 0) == CudaError.SUCCESS
    assert cuda.cudaEventQuery(outside) == CudaError.SUCCESS
    assert cuda.cudaStreamWaitEvent(stream, outside, 0) == CudaError.STREAM_CAPTURE_ISOLATION
    assert status(cuda, stream) == INVALIDATED


def test_a_captured_event_cannot_be_asked(cuda):
    event, stream = make(cuda.cudaEventCreate), begin(cuda)
    cuda.cudaEventRecord(event, stream)
    assert cuda.cudaEventQuery(event) == CudaError.CAPTURED_EVENT
    assert status(cuda, stream) == INVALIDATED


def test_captures_of_several_streams_are_refused(cuda):
    event, stream, other = make(cuda.cudaEventCreate), begin(cuda), new_stream(cuda)
    cuda.cudaEventRecord(event, stream)
    assert cuda.cudaStreamWaitEvent(other, event, 0) == CudaError.NOT_SUPPORTED
