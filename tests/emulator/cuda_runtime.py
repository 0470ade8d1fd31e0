"""The stand-in CUDA runtime from Python: its calls by name, its error codes, and why a call failed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from tests.emulator import native, toolchain


class CudaError(IntEnum):
    """cudaError_t, as driver_types.h numbers it."""

    SUCCESS = 0
    INVALID_VALUE = 1
    MEMORY_ALLOCATION = 2
    INVALID_CONFIGURATION = 9
    INVALID_PITCH_VALUE = 12
    INVALID_SYMBOL = 13
    INVALID_MEMCPY_DIRECTION = 21
    MISSING_CONFIGURATION = 52
    INVALID_DEVICE_FUNCTION = 98
    INVALID_DEVICE = 101
    INVALID_KERNEL_IMAGE = 200
    NO_KERNEL_IMAGE_FOR_DEVICE = 209
    INVALID_PTX = 218
    INVALID_RESOURCE_HANDLE = 400
    ILLEGAL_STATE = 401
    ILLEGAL_ADDRESS = 700
    LAUNCH_OUT_OF_RESOURCES = 701
    LAUNCH_TIMEOUT = 702
    ASSERT = 710
    ILLEGAL_INSTRUCTION = 715
    MISALIGNED_ADDRESS = 716
    LAUNCH_FAILURE = 719
    NOT_SUPPORTED = 801
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901
    STREAM_CAPTURE_ISOLATION = 905
    STREAM_CAPTURE_IMPLICIT = 906
    CAPTURED_EVENT = 907
    STREAM_CAPTURE_WRONG_THREAD = 908
    INVALID_CLUSTER_SIZE = 912
    UNKNOWN = 999


class Launchers:
    """Host code that runs on the emulator: `launchers.f(a, b)` calls its `extern "C" cudaError_t f`.

    Integers are passed as 64-bit ones, so that addresses survive; floats and structures need ctypes' types.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> CudaError:
            return CudaError(function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments)))

        return call

    def address(self, name: str) -> int:
        """What `extern "C" const void* name()` returns."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_void_p
        return int(function())


def load_launchers(sources: Iterable[Path], *, arch: str, options: Iterable[str] = ()) -> Launchers:
    """Compiles host and device code for `arch` ("sm_80") against the emulator and loads it."""
    library = native.build_library()
    native.library()
    path = toolchain.compile_launchers(list(sources), arch=arch, library=library, options=list(options))
    return Launchers(ctypes.CDLL(str(path)))


def runtime() -> Launchers:
    """The CUDA runtime's own calls: `runtime().cudaFree(address)`."""
    return Launchers(native.library())


def last_message() -> str:
    """Why the last CUDA call that failed did so; empty where none did."""
    function = native.library().emulator_runtime_last_message
    function.restype = ctypes.c_char_p
    return str(function().decode())


def reset() -> None:
    """Destroys streams, events and graphs, and forgets errors, those that corrupt the context included."""
    native.library().emulator_runtime_reset()
