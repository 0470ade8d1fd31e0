"""The front for tests: pass arrays, launch, look at what the checks found and what was counted.

machine = Machine("a100")
module = machine.load(compile_ptx("kernel.cu", arch="sm_80"))
result = module.launch("scale", grid=4, block=128, x, Output(y), np.int32(n))
result.assert_clean()
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulator.devices import Device, device
from tests.emulator.native import library


class EmulatorError(RuntimeError):
    """A run that cannot go on; the base of those below."""


class ParseError(EmulatorError):
    """The text is not PTX, or breaks off; the message has the line."""


class Unsupported(EmulatorError):
    """The PTX uses what the emulator does not model; the message has the line."""


class ArgumentError(EmulatorError):
    """An argument is wrong: an unknown kernel, a wrong number or size of arguments, a buffer too small."""


_ERRORS: dict[str, type[EmulatorError]] = {
    kind.__name__: kind for kind in (EmulatorError, ParseError, Unsupported, ArgumentError)
}


def _check(result: Any, failure: Any = -1) -> Any:
    if result != failure:
        return result
    kind, _, message = library().emulator_last_error().decode(errors="replace").partition("\n")
    raise _ERRORS[kind](message)


@dataclass(frozen=True)
class Finding:
    """One thing that a check found, at one instruction; `count` says how often."""

    check: str
    message: str
    kernel: str
    ptx_line: int
    ptx_text: str
    cuda_file: str
    cuda_line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    warp: int
    lane: int
    buffer: str
    offset: int
    count: int

    def __str__(self) -> str:
        cuda = f" ({Path(self.cuda_file).name}:{self.cuda_line})" if self.cuda_file else ""
        times = f", {self.count} times" if self.count > 1 else ""
        return (
            f"{self.check}: {self.kernel} PTX line {self.ptx_line}{cuda} `{self.ptx_text}` "
            f"block {self.block} thread {self.thread} lane {self.lane}{times}: {self.message}"
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a launch moved of one buffer; `unique_*` count each once: the least that DRAM must carry."""

    name: str
    bytes_read: int
    bytes_written: int
    unique_read: int
    unique_written: int


@dataclass(frozen=True)
class StepCounters:
    """One PTX instruction of a launch: how often warps ran it, and what its requests cost."""

    opcode: str
    ptx_line: int
    cuda_line: int
    executed: int
    lanes: int
    requests: int
    sectors: int
    ideal_sectors: int
    shared_requests: int
    wavefronts: int
    ideal_wavefronts: int


@dataclass(frozen=True)
class Launch:
    """One launch: its findings and its counters."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared_bytes: int
    completed: bool
    findings: list[Finding]
    steps: list[StepCounters]
    buffers: dict[str, Traffic]

    @staticmethod
    def from_json(text: str) -> Launch:
        record = json.loads(text)
        findings = [
            Finding(**{**f, "block": tuple(f["block"]), "thread": tuple(f["thread"])})
            for f in record["findings"]
        ]
        return Launch(
            kernel=record["kernel"],
            grid=tuple(record["grid"]),
            block=tuple(record["block"]),
            dynamic_shared_bytes=record["dynamic_shared_bytes"],
            completed=record["completed"],
            findings=findings,
            steps=[StepCounters(**s) for s in record["steps"]],
            buffers={b["name"]: Traffic(**b) for b in record["buffers"]},
        )

    @cached_property
    def instructions(self) -> dict[str, int]:
        """Warp instructions executed, by opcode with its modifiers."""
        total: dict[str, int] = {}
        for step in self.steps:
            total[step.opcode] = total.get(step.opcode, 0) + step.executed
        return total

    def total(self, counter: str, opcode: str = "") -> int:
        """The sum of one of StepCounters' numbers over the instructions whose opcode starts with `opcode`."""
        return sum(getattr(step, counter) for step in self.steps if step.opcode.startswith(opcode))


@dataclass(frozen=True)
class Result:
    """All launches of one run."""

    launches: list[Launch]
    value: Any = None

    @property
    def findings(self) -> list[Finding]:
        return [finding for launch in self.launches for finding in launch.findings]

    @property
    def only(self) -> Launch:
        """The launch, where there is just one."""
        if len(self.launches) != 1:
            raise ValueError(f"{len(self.launches)} launches, not one")
        return self.launches[0]

    def kinds(self) -> set[str]:
        return {finding.check for finding in self.findings}

    def assert_clean(self) -> Result:
        """Fails with every finding's text where a check found something or a launch did not complete."""
        problems = [str(finding) for finding in self.findings]
        problems += [f"{launch.kernel} did not complete" for launch in self.launches if not launch.completed]
        assert not problems, "\n".join(problems)
        return self


@dataclass(frozen=True)
class Output:
    """An array that the kernel writes: undefined before the launch, so that reading it first is found."""

    array: Any


@dataclass
class Buffer:
    """Device memory that holds an array's view, strides and gaps as they are; only the view is accessible."""

    pointer: int
    name: str
    array: Any
    _start: int = 0  # where the view's first byte in memory lies on the host
    _bytes: int = 0
    _allocation: int = 0
    _freed: bool = field(default=False, repr=False)

    def fetch(self) -> None:
        """Copies what the device holds back into the array."""
        if self._bytes:
            _check(library().emulator_read(self._allocation, self._start, self._bytes))

    def undefined(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which bytes of the buffer's extent are undefined."""
        out = np.zeros(self._bytes, np.uint8)
        if self._bytes:
            _check(library().emulator_read_undefined(self._allocation, out.ctypes.data, self._bytes))
        return out != 0

    def free(self) -> None:
        if not self._freed:
            _check(library().emulator_free(self._allocation))
            self._freed = True


def _layout(array: Any) -> tuple[int, int, tuple[int, ...], tuple[int, ...], int]:
    """Host address, element bytes, shape, byte strides, and offset in its storage, numpy's or torch's."""
    if isinstance(array, np.ndarray):
        if array.dtype.hasobject:
            raise ArgumentError(
                f"an array of Python objects, dtype {array.dtype}: they have no bytes to pass"
            )
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        return (
            array.ctypes.data,
            array.itemsize,
            array.shape,
            array.strides,
            array.ctypes.data - base.ctypes.data,
        )
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise ArgumentError(f"a tensor on {array.device}: only CPU tensors can be passed")
        item = array.element_size()
        strides = tuple(s * item for s in array.stride())
        return (array.data_ptr(), item, tuple(array.shape), strides, array.storage_offset() * item)
    raise ArgumentError(f"neither a numpy array nor a torch tensor: {type(array).__name__}")


class Machine:
    """The emulated machine, set to one of `devices.DEVICES`, with the order in which blocks run.

    order: "forward", "reverse" or "random" (then `seed` picks one). truncating: tensor cores round as
    hardware does, block-wise towards zero, instead of plain fp32. The process has one machine: settings
    apply to the launches that this object makes.
    """

    def __init__(
        self,
        device_name: str = "a100",
        *,
        order: str = "forward",
        seed: int = 0,
        truncating: bool = False,
        check_races: bool = True,
        max_instructions: int = 100_000_000,
    ) -> None:
        orders = ("forward", "reverse", "random")
        if order not in orders:
            raise ArgumentError(f"order is one of {', '.join(orders)}, not {order!r}")
        self.device: Device = device(device_name)
        self._settings = {
            "order": orders.index(order),
            "seed": seed,
            "truncating_tensor_cores": int(truncating),
            "check_races": int(check_races),
            "max_instructions": max_instructions,
        }
        self._apply()

    def _apply(self) -> None:
        lib, d = library(), self.device
        lib.emulator_set_device_name(d.name.encode())
        limits = {
            "major": d.compute_capability[0],
            "minor": d.compute_capability[1],
            "multiprocessors": d.multiprocessors,
            "max_threads_per_block": d.max_threads_per_block,
            "max_threads_per_multiprocessor": d.max_threads_per_sm,
            "max_blocks_per_multiprocessor": d.max_blocks_per_sm,
            "registers_per_multiprocessor": d.registers_per_sm,
            "registers_per_block": d.registers_per_block,
            "shared_per_multiprocessor": d.shared_memory_per_sm,
            "shared_per_block": d.shared_memory_per_block,
            "shared_per_block_optin": d.shared_memory_per_block_optin,
            "shared_reserved_per_block": d.shared_memory_reserved_per_block,
            "l2_bytes": d.l2_bytes,
            "memory_bytes": d.global_memory_bytes,
        }
        for name, value in limits.items():
            _check(lib.emulator_set_limit(name.encode(), int(value)))
        for name, value in self._settings.items():
            _check(lib.emulator_set_setting(name.encode(), value))

    def load(self, ptx: str | Path) -> Module:
        """A module from PTX text, or from a file of it. Raises ParseError."""
        text = ptx.read_text() if isinstance(ptx, Path) else ptx
        if "\0" in text:
            raise ParseError("the text holds a zero byte: this is not PTX")
        return Module(self, _check(library().emulator_load(text.encode())))

    def allocate(self, count: int, name: str = "memory") -> int:
        """The address of `count` bytes, undefined, and committed only where they are touched."""
        return int(_check(library().emulator_allocate(count, name.encode(), 0), 0))

    def free(self, address: int) -> None:
        """Frees what `allocate` gave. Raises ArgumentError where nothing was allocated."""
        _check(library().emulator_free(address))

    def place(self, array: Any, name: str = "array") -> Buffer:
        """Copies an array (or an Output's, undefined) to the device; only its view is accessible."""
        defined = not isinstance(array, Output)
        if isinstance(array, Output):
            array = array.array
        lib = library()
        address, item, shape, strides, skew = _layout(array)
        empty = 0 in shape
        reaches = [(n - 1) * s for n, s in zip(shape, strides, strict=True)] if not empty else []
        low = sum(r for r in reaches if r < 0)
        extent = 0 if empty else sum(abs(r) for r in reaches) + item
        allocation = _check(lib.emulator_allocate(extent, name.encode(), (skew + low) % 256), 0)
        if extent:
            _check(lib.emulator_write(allocation, address + low, extent))
        sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        steps = (ctypes.c_int64 * max(len(shape), 1))(*strides)
        _check(lib.emulator_restrict(allocation, -low, item, len(shape), sizes, steps))
        if not defined and extent:
            _check(lib.emulator_set_undefined(allocation, extent))
        return Buffer(allocation - low, name, array, address + low, extent, allocation)

    @contextmanager
    def buffers(self, **arrays: Any) -> Iterator[dict[str, Buffer]]:
        """Places the arrays by name; on leaving, copies them back and frees them."""
        placed: dict[str, Buffer] = {}
        try:
            for name, array in arrays.items():
                placed[name] = self.place(array, name)
            yield placed
            for buffer in placed.values():
                buffer.fetch()
        finally:
            for buffer in placed.values():
                buffer.free()

    def run(self, call: Callable[[], Any]) -> Result:
        """Runs host code that launches, a real launcher's for example; the result has all its launches."""
        self._apply()
        lib = library()
        lib.emulator_clear_launches()
        value = call()
        records = [
            _check(lib.emulator_launch_record(i), None).decode() for i in range(lib.emulator_launches())
        ]
        lib.emulator_clear_launches()
        return Result([Launch.from_json(record) for record in records], value)


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    bytes: int


class Module:
    """A loaded PTX module."""

    def __init__(self, machine: Machine, handle: int) -> None:
        self.machine = machine
        self._handle = handle

    @cached_property
    def kernels(self) -> list[str]:
        return list(json.loads(_check(library().emulator_kernels(self._handle), None)))

    def describe(self, kernel: str) -> dict[str, Any]:
        """The kernel's parameters, shared and local bytes, and opcodes. Raises ArgumentError, Unsupported."""
        return dict(json.loads(_check(library().emulator_kernel(self._handle, kernel.encode()), None)))

    def variable(self, name: str) -> tuple[int, int]:
        """Address and bytes of a .global or .const variable."""
        address, count = ctypes.c_uint64(), ctypes.c_uint64()
        _check(
            library().emulator_variable(
                self._handle, name.encode(), ctypes.byref(address), ctypes.byref(count)
            )
        )
        return address.value, count.value

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Any,
        shared: int = 0,
        names: Sequence[str] = (),
    ) -> Result:
        """Runs a kernel. Arrays go to the device and back; numpy scalars, numbers and bytes go by value.

        grid, block: blocks and threads in x, y, z. shared: dynamic shared memory in bytes. names: of the
        arguments, for the findings; by default "argument 0" and so on. Raises ArgumentError on a wrong number
        or size of arguments, and where the device's limits are exceeded.
        """
        facts = self.describe(kernel)
        parameters = [Parameter(**p) for p in facts["parameters"]]
        if len(arguments) != len(parameters):
            raise ArgumentError(f"kernel `{kernel}` takes {len(parameters)} arguments, not {len(arguments)}")
        shape = (ctypes.c_uint32 * 6)(*_three(grid, "grid"), *_three(block, "block"))
        packed = bytearray(facts["parameter_bytes"])
        placed: list[Buffer] = []
        try:
            for i, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
                name = names[i] if i < len(names) else f"argument {i}"
                if isinstance(argument, Output) or hasattr(argument, "data_ptr") or _is_array(argument):
                    placed.append(self.machine.place(argument, name))
                    argument = placed[-1]
                value = _pack(argument, parameter, name)
                packed[parameter.offset : parameter.offset + parameter.bytes] = value
            block_bytes = bytes(packed)

            def run() -> None:
                _check(
                    library().emulator_launch(
                        self._handle, kernel.encode(), shape, shared, block_bytes, len(block_bytes)
                    )
                )

            result = self.machine.run(run)
            for buffer in placed:
                buffer.fetch()
            return result
        finally:
            for buffer in placed:
                buffer.free()

    def unload(self) -> None:
        _check(library().emulator_unload(self._handle))


def _is_array(argument: Any) -> bool:
    return isinstance(argument, np.ndarray) and argument.shape != ()


def _three(sizes: int | Sequence[int], name: str) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(given) <= 3 or any(n < 1 for n in given):
        raise ArgumentError(f"{name} is one to three positive numbers, not {sizes!r}")
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _pack(argument: Any, parameter: Parameter, name: str) -> bytes:
    """An argument's bytes as the parameter takes them."""
    if isinstance(argument, Buffer):
        argument = np.uint64(argument.pointer)
    if isinstance(argument, bool) or not isinstance(argument, int | float):
        array = np.asarray(argument)
        if array.dtype.hasobject:
            raise ArgumentError(f"{name}: a {type(argument).__name__} cannot be passed to a kernel")
        value = argument if isinstance(argument, bytes) else array.tobytes()
    elif isinstance(argument, float):
        if parameter.bytes not in (4, 8):
            raise ArgumentError(f"{name}: a float for a parameter of {parameter.bytes} bytes")
        value = np.array(argument, f"f{parameter.bytes}").tobytes()
    else:
        try:
            value = argument.to_bytes(parameter.bytes, "little", signed=argument < 0)
        except OverflowError:
            raise ArgumentError(f"{name}: {argument} does not fit in {parameter.bytes} bytes") from None
    if len(value) != parameter.bytes:
        raise ArgumentError(f"{name}: {len(value)} bytes for a parameter of {parameter.bytes}")
    return value
