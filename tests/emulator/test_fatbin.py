"""Which device code the stand-in runtime takes out of a fat binary, and what it refuses."""

from __future__ import annotations

import ctypes
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Machine
from tests.emulator.cuda_runtime import CudaError, last_message, load_launchers, reset, runtime
from tests.emulator.static_report import static_report
from tests.emulator.test_runtime import FuncAttributes

KERNELS = Path(__file__).parent / "kernels"
PTX, ELF = 1, 2
LZ4, ZSTD = 0x2000, 0x8000
WRAPPER_MAGIC, CONTAINER_MAGIC = 0x466243B1, 0xBA55ED50


@pytest.fixture(scope="module")
def cuda():
    return runtime()


@pytest.fixture(autouse=True)
def machine():
    yield Machine("a100")
    reset()


def ptx(target, body="ret;"):
    return f".version 9.0\n.target {target}\n.address_size 64\n.visible .entry kernel()\n{{\n{body}\n}}\n"


def entry(payload, arch=80, kind=PTX, flags=0):
    payload = payload.encode() if isinstance(payload, str) else payload
    payload += bytes(-len(payload) % 8)
    header = struct.pack(
        "<HHIQIIHHIIIQQQ", kind, 0x101, 64, len(payload), 0, 0, 0, 9, arch, 0, 0, flags, 0, 0
    )
    return header + payload


def container(*entries, magic=CONTAINER_MAGIC, cut=0):
    body = b"".join(entries)
    return struct.pack("<IHHQ", magic, 1, 16, len(body) - cut) + body


@contextmanager
def registered(cuda, data, magic=WRAPPER_MAGIC, version=1):
    """Registers a fat binary with a kernel `kernel`, as host code does; gives the host function's address."""
    library = cuda._library
    register = getattr(library, "__cudaRegisterFatBinary")
    register.restype = ctypes.c_void_p
    storage = ctypes.create_string_buffer(data, len(data))
    wrapper = struct.pack("<IIQQ", magic, version, ctypes.addressof(storage), 0)
    handle = ctypes.c_void_p(register(wrapper))
    host_function = ctypes.create_string_buffer(1)
    address = ctypes.addressof(host_function)
    getattr(library, "__cudaRegisterFunction")(
        handle, ctypes.c_void_p(address), None, b"kernel", -1, None, None, None, None, None
    )
    getattr(library, "__cudaRegisterFatBinaryEnd")(handle)
    yield address
    getattr(library, "__cudaUnregisterFatBinary")(handle)


def attributes(cuda, function):
    result = FuncAttributes()
    return cuda.cudaFuncGetAttributes(ctypes.byref(result), function), result


@pytest.mark.parametrize(
    ("device", "targets", "expected"),
    [
        ("a100", ["sm_75", "sm_80", "sm_86"], 80),
        ("l4", ["sm_75", "sm_80", "sm_86", "sm_90"], 86),
        ("h100", ["sm_80", "sm_90a", "sm_100"], 90),
        ("b200", ["sm_80", "sm_90a"], 80),  # code for 9.0 alone
        ("b200", ["sm_90", "sm_100f"], 100),
        ("rtx5090", ["sm_90", "sm_100f"], 90),  # another family
        ("a100", ["sm_86", "sm_75"], 75),
    ],
)
def test_the_newest_ptx_that_the_device_runs(cuda, device, targets, expected):
    Machine(device)
    with registered(cuda, container(*(entry(ptx(target)) for target in targets))) as function:
        error, result = attributes(cuda, function)
    assert (error, result.ptx) == (CudaError.SUCCESS, expected)


def test_specific_code_goes_before_general_code(cuda):
    Machine("h100")
    for targets in (["sm_90", "sm_90a"], ["sm_90a", "sm_90"]):
        images = [entry(ptx(t, ".shared .b8 s[16]; ret;" if t == "sm_90a" else "ret;")) for t in targets]
        with registered(cuda, container(*images)) as function:
            assert attributes(cuda, function)[1].shared == 16


@pytest.mark.parametrize(
    ("device", "targets", "held"),
    [
        ("a100", ["sm_86", "sm_90a"], "PTX for sm_86, sm_90a"),
        ("rtx5090", ["sm_90a"], "PTX for sm_90a"),
        ("a100", [], "no PTX"),
    ],
)
def test_no_image_for_the_device(cuda, device, targets, held):
    Machine(device)
    with registered(cuda, container(*(entry(ptx(target)) for target in targets))) as function:
        assert attributes(cuda, function)[0] == CudaError.NO_KERNEL_IMAGE_FOR_DEVICE
        assert held in last_message()
        assert cuda.cudaGetLastError() == CudaError.NO_KERNEL_IMAGE_FOR_DEVICE
        Machine("h100")  # a device that the PTX is for, if there is any
        expected = CudaError.SUCCESS if targets else CudaError.NO_KERNEL_IMAGE_FOR_DEVICE
        assert attributes(cuda, function)[0] == expected


@pytest.mark.parametrize("flags", [LZ4, ZSTD])
def test_compressed_ptx_is_refused(cuda, capfd, flags):
    with registered(cuda, container(entry(b"\x28\xb5\x2f\xfd", flags=flags))) as function:
        for _ in range(2):
            assert attributes(cuda, function)[0] == CudaError.INVALID_KERNEL_IMAGE
            assert "compute_80 is compressed: compile with nvcc --no-compress" in last_message()
    assert capfd.readouterr().err.count("--no-compress") == 1


@pytest.mark.parametrize(
    ("data", "wrapper", "message"),
    [
        (container(entry(ptx("sm_80"))), {"magic": 1}, "no fat binary"),
        (container(entry(ptx("sm_80"))), {"version": 2}, "-rdc=true"),
        (container(entry(ptx("sm_80")), magic=1), {}, "no container"),
        (container(entry(ptx("sm_80")), cut=8), {}, "beyond the end"),
        (container(entry(ptx("sm_80")) + bytes(20)), {}, "within a header"),
        (container(entry(".version 9.0\n")), {}, "without a .target"),
        (container(entry(bytes(128), kind=ELF)), {}, "no ELF"),
        (container(entry(b"\x7fELF" + bytes(20), kind=ELF)), {}, "within a header"),
    ],
)
def test_damaged_binaries_are_refused(cuda, data, wrapper, message):
    with registered(cuda, data, **wrapper) as function:
        assert attributes(cuda, function)[0] == CudaError.INVALID_KERNEL_IMAGE
        assert message in last_message()


def test_ptx_is_parsed_at_its_first_use(cuda):
    with registered(cuda, container(entry(ptx("sm_80", "mov.u32 %r1")))) as function:
        assert cuda.cudaPeekAtLastError() == CudaError.SUCCESS
        assert attributes(cuda, function)[0] == CudaError.INVALID_PTX
        assert "PTX line" in last_message()


def test_a_kernel_that_the_ptx_lacks(cuda):
    with registered(cuda, container(entry(ptx("sm_80").replace("kernel", "other")))) as function:
        assert attributes(cuda, function)[0] == CudaError.INVALID_DEVICE_FUNCTION
        assert "it has: other" in last_message()


def test_kernels_go_with_their_binary(cuda):
    with registered(cuda, container(entry(ptx("sm_80")))) as function:
        assert attributes(cuda, function)[0] == CudaError.SUCCESS
    assert attributes(cuda, function)[0] == CudaError.INVALID_DEVICE_FUNCTION


@pytest.fixture(scope="module")
def several():
    """sm_80 with PTX, and sm_90a with PTX, in one library."""
    options = ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]
    return load_launchers([KERNELS / "runtime_architecture.cu"], arch="sm_80", options=options)


@pytest.mark.parametrize(("device", "ran"), [("a100", 800), ("l4", 800), ("h100", 900), ("b200", 800)])
def test_what_nvcc_packs(several, device, ran):
    machine = Machine(device)
    out = np.zeros(1, np.int32)
    with machine.buffers(out=out) as b:
        assert several.launch_architecture(b["out"].pointer) == CudaError.SUCCESS
    assert out[0] == ran


@pytest.mark.parametrize(("device", "arch"), [("a100", "sm_80"), ("l4", "sm_80"), ("h100", "sm_90a")])
def test_registers_are_those_of_the_nearest_machine_code(several, cuda, device, arch):
    Machine(device)
    reports = static_report(KERNELS / "runtime_architecture.cu", arch=arch)
    [report] = [report for report in reports if report.demangled.startswith("pressure")]
    _, result = attributes(cuda, several.address("pressure_function"))
    assert result.registers == report.resources.registers > 0


def test_code_for_a_newer_device_alone():
    hopper = load_launchers([KERNELS / "runtime_architecture.cu"], arch="sm_90")
    machine = Machine("a100")
    with machine.buffers(out=np.zeros(1, np.int32)) as b:
        assert hopper.launch_architecture(b["out"].pointer) == CudaError.NO_KERNEL_IMAGE_FOR_DEVICE
    assert "the device is sm_80, the fat binary has PTX for sm_90" in last_message()


def test_code_that_is_loaded_into_a_corrupt_context(cuda, machine):
    """nvcc's host code registers its kernels, and looks them up, once: that must work all the same."""
    launchers = load_launchers([KERNELS / "runtime_launches.cu"], arch="sm_80")
    assert launchers.launch_trap() == CudaError.LAUNCH_FAILURE
    source = [KERNELS / "runtime_architecture.cu"]
    fresh = load_launchers(source, arch="sm_80", options=["-DUNUSED"])  # a library of this test's own
    with machine.buffers(out=np.zeros(1, np.int32)) as b:
        pointer = b["out"].pointer
        assert fresh.launch_architecture(pointer) == CudaError.LAUNCH_FAILURE
        reset()
        assert fresh.launch_architecture(pointer) == CudaError.SUCCESS, last_message()
