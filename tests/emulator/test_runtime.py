"""The stand-in CUDA runtime: launches, their limits, and the errors that real launches end with."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine
from tests.emulator.cuda_runtime import CudaError, last_message, load_launchers, reset, runtime
from tests.emulator.devices import DEVICES, device
from tests.emulator.occupancy import occupancy
from tests.emulator.static_report import static_report

SOURCE = Path(__file__).parent / "kernels" / "runtime_launches.cu"
MAX_DYNAMIC_SHARED, CARVEOUT = 8, 9  # cudaFuncAttribute


class Scale(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_uint64),
        ("in_", ctypes.c_uint64),
        ("factor", ctypes.c_float),
        ("count", ctypes.c_int),
    ]


class FuncAttributes(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_size_t) for name in ("shared", "constant", "local")],
        *[(name, ctypes.c_int) for name in ("max_threads", "registers", "ptx", "binary", "cache_ca")],
        *[(name, ctypes.c_int) for name in ("max_dynamic_shared", "carveout")],
        ("rest", ctypes.c_int * 64),
    ]


class Dim3(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


@pytest.fixture(scope="module")
def launchers():
    return load_launchers([SOURCE], arch="sm_80")


@pytest.fixture(scope="module")
def cuda():
    return runtime()


@pytest.fixture(autouse=True)
def machine():
    yield Machine("a100")
    reset()


def launch(cuda, function, grid=(1, 1, 1), block=(1, 1, 1), arguments=None, shared=0, stream=0):
    return cuda.cudaLaunchKernel(function, Dim3(*grid), Dim3(*block), arguments, shared, stream)


def attributes_of(cuda, function):
    attributes = FuncAttributes()
    assert cuda.cudaFuncGetAttributes(ctypes.byref(attributes), function) == CudaError.SUCCESS
    return attributes


# ---- parameters and results ---------------------------------------------------------------------------


def test_chevrons_pass_a_structure(launchers, machine):
    x = np.arange(100, dtype=np.float32)
    y = np.zeros(128, np.float32)
    with machine.buffers(x=x, y=y) as b:
        p = Scale(b["y"].pointer, b["x"].pointer, 2.5, x.size)
        result = machine.run(lambda: launchers.launch_scale(ctypes.byref(p), 32, 0)).assert_clean()
    assert result.value == CudaError.SUCCESS
    assert result.only.grid == (4, 1, 1)
    assert result.only.block == (32, 1, 1)
    np.testing.assert_array_equal(y, np.pad(2.5 * x, (0, 28)))


def test_parameters_of_every_width_reach_the_kernel(launchers, machine):
    out = np.zeros(6)
    with machine.buffers(out=out) as b:
        assert launchers.launch_widths(b["out"].pointer, ctypes.c_float(1.5), 9) == CudaError.SUCCESS
    assert out.tolist() == [-7, 0.125, -300, -(2.0**40), 1.5, 9]


def test_constants_and_device_variables(launchers, cuda, machine):
    coefficients = np.array([1, -2, 0.5, 0.25], np.float32)
    out = np.zeros(8, np.float32)
    assert launchers.set_coefficients(coefficients.ctypes.data, 16, 0) == CudaError.SUCCESS
    with machine.buffers(out=out) as b:
        assert launchers.launch_polynomial(b["out"].pointer, 8) == CudaError.SUCCESS
    expected = 3 * np.polyval(coefficients[::-1], np.arange(8))  # 3: the variable's initial value
    np.testing.assert_array_equal(out, expected)

    address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), np.array([-5], np.int32)
    launchers.multiplier_address(ctypes.byref(address), ctypes.byref(size))
    assert size.value == 4
    assert cuda.cudaMemcpy(address.value, value.ctypes.data, 4, 1) == CudaError.SUCCESS
    with machine.buffers(out=out) as b:
        assert launchers.launch_polynomial(b["out"].pointer, 8) == CudaError.SUCCESS
    np.testing.assert_array_equal(out, expected / 3 * -5)
    cuda.cudaMemcpy(address.value, np.array([3], np.int32).ctypes.data, 4, 1)


def test_symbols_are_copied_in_parts(launchers):
    whole, part = np.arange(4, dtype=np.float32), np.array([70, 80], np.float32)
    launchers.set_coefficients(whole.ctypes.data, 16, 0)
    assert launchers.set_coefficients(part.ctypes.data, 8, 4) == CudaError.SUCCESS
    assert launchers.get_coefficients(whole.ctypes.data, 16, 0) == CudaError.SUCCESS
    assert whole.tolist() == [0, 70, 80, 3]


@pytest.mark.parametrize(("count", "offset"), [(17, 0), (8, 12), (0, 17), (4, 2**63)])
def test_a_copy_beyond_a_symbol(launchers, count, offset):
    values = np.zeros(8, np.float32)
    set_error = launchers.set_coefficients(values.ctypes.data, count, ctypes.c_size_t(offset))
    get_error = launchers.get_coefficients(values.ctypes.data, count, ctypes.c_size_t(offset))
    assert {set_error, get_error} == {CudaError.INVALID_VALUE}
    assert "coefficients has 16 bytes" in last_message()


def test_what_is_no_symbol(cuda):
    value = ctypes.c_int()
    error = cuda.cudaMemcpyToSymbol(ctypes.addressof(value), ctypes.byref(value), 4, 0, 1)
    assert error == CudaError.INVALID_SYMBOL


def test_findings_do_not_fail_a_launch(launchers, machine):
    with machine.buffers(out=np.zeros(1, np.int32)) as b:
        result = machine.run(lambda: launchers.launch_race(b["out"].pointer))
    assert result.value == CudaError.SUCCESS
    assert result.only.completed
    assert "race" in " ".join(result.kinds()).lower()


# ---- limits of a launch ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (1, 1, 1)),
        ((1, 1, 0), (1, 1, 1)),
        ((2**31, 1, 1), (1, 1, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((1, 1, 65536), (1, 1, 1)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (1, 1, 65)),
        ((1, 1, 1), (33, 32, 1)),
    ],
)
def test_a_shape_that_no_kernel_may_have(cuda, launchers, grid, block):
    assert launch(cuda, launchers.address("trap_function"), grid, block) == CudaError.INVALID_CONFIGURATION
    assert cuda.cudaGetLastError() == CudaError.INVALID_CONFIGURATION
    assert cuda.cudaGetLastError() == CudaError.SUCCESS


def test_a_grid_that_is_too_large_to_emulate(cuda, launchers):
    error = launch(cuda, launchers.address("trap_function"), (2**20, 1, 1))
    assert error == CudaError.NOT_SUPPORTED
    assert cuda.cudaDeviceSynchronize() == CudaError.SUCCESS


def test_launch_bounds(launchers, machine):
    with machine.buffers(out=np.zeros(96, np.int32)) as b:
        pointer = b["out"].pointer
        assert launchers.launch_bounded(pointer, 64, 1) == CudaError.SUCCESS
        assert launchers.launch_bounded(pointer, 65, 1) == CudaError.INVALID_VALUE
        assert "launch bounds allow 64" in last_message()


def test_launch_attributes(launchers, machine):
    with machine.buffers(out=np.zeros(64, np.int32)) as b:
        pointer = b["out"].pointer
        assert launchers.launch_bounded(pointer, 64, 2) == CudaError.NOT_SUPPORTED
        assert launchers.launch_bounded(pointer, 64, 3) == CudaError.INVALID_CLUSTER_SIZE
        assert launchers.launch_bounded(pointer, 64, 0) == CudaError.INVALID_CLUSTER_SIZE
        assert launchers.launch_cooperative(pointer) == CudaError.NOT_SUPPORTED


def test_registers(launchers, cuda, machine):
    attributes = attributes_of(cuda, launchers.address("hungry_function"))
    fits = attributes.max_threads
    assert occupancy(machine.device, fits, attributes.registers, 0).blocks > 0
    assert occupancy(machine.device, fits + 1, attributes.registers, 0).blocks == 0
    with machine.buffers(values=np.ones(96 * 1024, np.float32)) as b:
        pointer = b["values"].pointer
        assert launchers.launch_hungry(pointer, fits) == CudaError.SUCCESS
        assert launchers.launch_hungry(pointer, fits + 1) == CudaError.LAUNCH_OUT_OF_RESOURCES
        assert f"{fits + 1} threads of {attributes.registers} registers" in last_message()


def test_dynamic_shared_memory_needs_opting_in(launchers, cuda, machine):
    function = launchers.address("reverse_function")
    most = machine.device.shared_memory_per_block_optin
    row = np.arange(most // 4, dtype=np.float32)
    with machine.buffers(row=row) as b:
        pointer = b["row"].pointer
        assert launchers.launch_reverse(pointer, 48 * 256) == CudaError.SUCCESS
        assert launchers.launch_reverse(pointer, 48 * 256 + 1) == CudaError.INVALID_VALUE
        assert cuda.cudaFuncSetAttribute(function, MAX_DYNAMIC_SHARED, most + 1) == CudaError.INVALID_VALUE
        assert cuda.cudaFuncSetAttribute(function, MAX_DYNAMIC_SHARED, -1) == CudaError.INVALID_VALUE
        assert launchers.launch_reverse(pointer, 48 * 256 + 1) == CudaError.INVALID_VALUE
        assert cuda.cudaFuncSetAttribute(function, MAX_DYNAMIC_SHARED, most) == CudaError.SUCCESS
        assert launchers.launch_reverse(pointer, most // 4) == CudaError.SUCCESS
    assert attributes_of(cuda, function).max_dynamic_shared == most
    twice_reversed = np.concatenate([np.arange(48 * 256)[::-1], np.arange(48 * 256, most // 4)])[::-1]
    np.testing.assert_array_equal(row, twice_reversed)
    cuda.cudaFuncSetAttribute(function, MAX_DYNAMIC_SHARED, 48 * 1024)


def test_static_shared_memory_counts(launchers, cuda, machine):
    function, static = launchers.address("static_shared_function"), 16384
    most = machine.device.shared_memory_per_block_optin
    with machine.buffers(out=np.zeros(32, np.float32)) as b:
        pointer = b["out"].pointer
        assert launchers.launch_static_shared(pointer, 49152 - static) == CudaError.SUCCESS
        assert launchers.launch_static_shared(pointer, 49152 - static + 1) == CudaError.INVALID_VALUE
    error = cuda.cudaFuncSetAttribute(function, MAX_DYNAMIC_SHARED, most - static + 1)
    assert error == CudaError.INVALID_VALUE


def test_a_null_argument(launchers, cuda):
    arguments = (ctypes.c_void_p * 1)(None)
    error = launch(cuda, launchers.address("bounded_function"), arguments=arguments)
    assert error == CudaError.INVALID_VALUE
    assert "args[0] is null" in last_message()


def test_what_is_no_kernel(cuda):
    value = ctypes.c_int()
    assert launch(cuda, ctypes.addressof(value)) == CudaError.INVALID_DEVICE_FUNCTION
    error = cuda.cudaFuncSetAttribute(ctypes.addressof(value), MAX_DYNAMIC_SHARED, 0)
    assert error == CudaError.INVALID_DEVICE_FUNCTION


def test_a_configuration_that_was_not_pushed(cuda):
    places = [ctypes.byref(Dim3()), ctypes.byref(Dim3()), ctypes.byref(ctypes.c_size_t())]
    error = cuda.__getattr__("__cudaPopCallConfiguration")(*places, ctypes.byref(ctypes.c_void_p()))
    assert error == CudaError.MISSING_CONFIGURATION


# ---- errors that corrupt the context --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "error"),
    [("trap", CudaError.LAUNCH_FAILURE), ("fail_assertion", CudaError.ASSERT)],
)
def test_a_kernel_that_stops_corrupts_the_context(launchers, cuda, kernel, error):
    assert getattr(launchers, f"launch_{kernel}")() == error
    message = last_message()
    assert kernel in message
    pointer = ctypes.c_void_p()
    assert cuda.cudaMalloc(ctypes.byref(pointer), 16) == error
    assert cuda.cudaDeviceSynchronize() == error
    assert cuda.cudaGetLastError() == error
    assert cuda.cudaGetLastError() == error  # no reset heals it
    assert last_message() == message
    reset()
    assert cuda.cudaPeekAtLastError() == CudaError.SUCCESS
    assert last_message() == ""
    assert cuda.cudaMalloc(ctypes.byref(pointer), 16) == CudaError.SUCCESS
    cuda.cudaFree(pointer)


def test_a_kernel_that_hangs(launchers, cuda, machine):
    with machine.buffers(flag=np.zeros(1, np.int32)) as b:
        result = machine.run(lambda: launchers.launch_hang(b["flag"].pointer))
    assert result.value == CudaError.LAUNCH_TIMEOUT
    assert not result.only.completed
    assert cuda.cudaDeviceSynchronize() == CudaError.LAUNCH_TIMEOUT


def test_an_instruction_that_is_not_emulated(launchers, cuda, machine):
    with machine.buffers(out=np.zeros(2, np.int32)) as b:
        assert launchers.launch_unknown_instruction(b["out"].pointer) == CudaError.NOT_SUPPORTED
    assert "vadd" in last_message()
    assert cuda.cudaDeviceSynchronize() == CudaError.SUCCESS


def test_error_names_and_texts(cuda):
    name, text = (getattr(cuda._library, f"cudaGetError{kind}") for kind in ("Name", "String"))
    name.restype = text.restype = ctypes.c_char_p
    for error in CudaError:
        spelled = "cuda" + ("" if error == CudaError.SUCCESS else "Error")
        spelled += error.name.title().replace("_", "")
        assert name(error).decode() == spelled
        assert text(error).decode() not in ("", "unrecognized error code")
    assert name(12345) == text(12345) == b"unrecognized error code"


def test_an_error_belongs_to_its_call(cuda):
    assert cuda.cudaSetDevice(1) == CudaError.INVALID_DEVICE
    assert cuda.cudaSetDevice(0) == CudaError.SUCCESS
    assert cuda.cudaPeekAtLastError() == CudaError.INVALID_DEVICE
    assert last_message() == "cudaSetDevice: cudaErrorInvalidDevice (invalid device ordinal): device is 1"
    assert cuda.cudaGetLastError() == CudaError.INVALID_DEVICE
    assert cuda.cudaPeekAtLastError() == CudaError.SUCCESS


# ---- attributes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
def test_device_attributes(cuda, name):
    Machine(name)
    d = device(name)
    expected = {
        1: d.max_threads_per_block,
        8: d.shared_memory_per_block,
        10: d.warp_size,
        12: d.registers_per_block,
        16: d.multiprocessors,
        38: d.l2_bytes,
        39: d.max_threads_per_sm,
        75: d.compute_capability[0],
        76: d.compute_capability[1],
        81: d.shared_memory_per_sm,
        82: d.registers_per_sm,
        97: d.shared_memory_per_block_optin,
        106: d.max_blocks_per_sm,
        111: d.shared_memory_reserved_per_block,
        120: int(d.compute_capability >= (9, 0)),
    }
    value = ctypes.c_int()
    for attribute, number in expected.items():
        assert cuda.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0) == CudaError.SUCCESS
        assert value.value == number, attribute


def test_unknown_devices_and_attributes(cuda):
    value = ctypes.c_int()
    assert cuda.cudaDeviceGetAttribute(ctypes.byref(value), 9999, 0) == CudaError.INVALID_VALUE
    assert cuda.cudaDeviceGetAttribute(ctypes.byref(value), 16, 1) == CudaError.INVALID_DEVICE
    assert cuda.cudaDeviceGetAttribute(None, 16, 0) == CudaError.INVALID_VALUE
    assert cuda.cudaGetDeviceCount(ctypes.byref(value)) == CudaError.SUCCESS
    assert value.value == 1


@pytest.mark.parametrize("kernel", ["scale", "reverse", "bounded", "hungry", "static_shared"])
def test_kernel_attributes_are_the_compilers(launchers, cuda, kernel):
    [report] = [r for r in static_report(SOURCE, arch="sm_80") if r.demangled.startswith(f"{kernel}(")]
    attributes = attributes_of(cuda, launchers.address(f"{kernel}_function"))
    assert attributes.registers == report.resources.registers
    assert attributes.shared == {"static_shared": 16384}.get(kernel, 0)
    assert (attributes.ptx, attributes.binary) == (80, 80)


def test_the_carveout_is_a_percentage(launchers, cuda):
    function = launchers.address("scale_function")
    assert cuda.cudaFuncSetAttribute(function, CARVEOUT, 50) == CudaError.SUCCESS
    assert attributes_of(cuda, function).carveout == 50
    assert cuda.cudaFuncSetAttribute(function, CARVEOUT, 101) == CudaError.INVALID_VALUE
    assert cuda.cudaFuncSetAttribute(function, CARVEOUT, -2) == CudaError.INVALID_VALUE
    assert cuda.cudaFuncSetAttribute(function, 99, 1) == CudaError.INVALID_VALUE


@pytest.mark.parametrize("name", ["a100", "l4", "h100", "rtx5090"])
@pytest.mark.parametrize("kernel", ["scale", "hungry", "static_shared"])
def test_occupancy(launchers, cuda, name, kernel):
    Machine(name)
    function = launchers.address(f"{kernel}_function")
    attributes = attributes_of(cuda, function)
    blocks = ctypes.c_int()
    for threads in (1, 32, 33, 96, 128, 160, 256, 384, 512, 1024):
        for shared in (0, 1, 1000, 20000, 32768):
            error = cuda.cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), function, threads, shared
            )
            assert error == CudaError.SUCCESS
            expected = occupancy(device(name), threads, attributes.registers, attributes.shared + shared)
            assert blocks.value == expected.blocks, (threads, shared)


def test_occupancy_of_what_cannot_be_launched(launchers, cuda):
    function, blocks = launchers.address("bounded_function"), ctypes.c_int(-1)
    call = cuda.cudaOccupancyMaxActiveBlocksPerMultiprocessor
    assert call(ctypes.byref(blocks), function, 65, 0) == CudaError.SUCCESS
    assert blocks.value == 0
    assert call(ctypes.byref(blocks), function, 64, 49153) == CudaError.SUCCESS
    assert blocks.value == 0
    assert call(ctypes.byref(blocks), function, 0, 0) == CudaError.INVALID_VALUE
