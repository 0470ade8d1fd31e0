"""cuTensorMapEncodeTiled of the stand-in driver: how it is found, and which arguments it refuses."""

from __future__ import annotations

import ctypes

import pytest

from tests.emulator import Machine
from tests.emulator.cuda_runtime import CudaError, last_message, reset, runtime

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 801  # CUresult
UINT8, UINT16, FLOAT32, BFLOAT16, PACKED_U4 = 0, 1, 7, 9, 13  # CUtensorMapDataType
NO_INTERLEAVE, INTERLEAVE_16B, INTERLEAVE_32B = range(3)
NO_SWIZZLE, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B = range(4)
FOUND, NOT_FOUND, VERSION_TOO_OLD = range(3)  # cudaDriverEntryPointQueryResult


@pytest.fixture(scope="module")
def cuda():
    return runtime()


@pytest.fixture(autouse=True)
def machine():
    yield Machine("h100")
    reset()


def look_up(cuda, symbol, version=12000):
    function, found = ctypes.c_void_p(1), ctypes.c_int(-1)
    error = cuda.cudaGetDriverEntryPointByVersion(
        symbol, ctypes.byref(function), version, 0, ctypes.byref(found)
    )
    assert error == CudaError.SUCCESS
    return function.value, found.value


@pytest.fixture(scope="module")
def encode(cuda):
    """Calls the function that was looked up; by default for a valid map of a bf16 matrix of 100 × 64."""
    address, _ = look_up(cuda, b"cuTensorMapEncodeTiled")
    function = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64,
        *[ctypes.c_void_p] * 4, *[ctypes.c_int] * 4,
    )(address)  # fmt: skip
    storage = ctypes.create_string_buffer(192)
    aligned = -ctypes.addressof(storage) % 64

    def encode(
        *, data_type=BFLOAT16, rank=None, address=0x1000, size=(64, 100), stride=(128,), box=(64, 8),
        element_stride=None, interleave=NO_INTERLEAVE, swizzle=SWIZZLE_128B, promotion=0, fill=0, skew=0,
    ):  # fmt: skip
        def array(kind, values):
            return None if values is None else (kind * max(len(values), 1))(*values)

        element_stride = [1] * len(size) if element_stride is None else element_stride
        arrays = [
            array(ctypes.c_uint64, size),
            array(ctypes.c_uint64, stride),
            array(ctypes.c_uint32, box),
            array(ctypes.c_uint32, element_stride),
        ]
        return function(
            ctypes.addressof(storage) + aligned + skew, data_type, len(size) if rank is None else rank,
            address, *arrays, interleave, swizzle, promotion, fill,
        )  # fmt: skip

    return encode


def cube(**changes):
    """Three dimensions, which an interleave needs."""
    return {"size": (64, 8, 8), "stride": (128, 1024), "box": (16, 8, 8), "swizzle": NO_SWIZZLE} | changes


def test_the_encoder_is_found_by_name(cuda):
    function, found = look_up(cuda, b"cuTensorMapEncodeTiled")
    assert function
    assert found == FOUND
    assert look_up(cuda, b"cuTensorMapEncodeTiled", 11080) == (None, VERSION_TOO_OLD)
    assert look_up(cuda, b"cuTensorMapEncodeIm2col") == (None, NOT_FOUND)
    pointer = ctypes.c_void_p()
    call = cuda.cudaGetDriverEntryPoint
    assert call(b"cuTensorMapEncodeTiled", ctypes.byref(pointer), 0, None) == CudaError.SUCCESS
    assert pointer.value == function
    assert call(None, ctypes.byref(pointer), 0, None) == CudaError.INVALID_VALUE


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"size": (2**32, 1)},
        {"stride": (2**40 - 16,)},
        {"box": (64, 256), "element_stride": (0, 8)},  # the first is ignored
        {"size": (64,), "stride": (), "box": (64,)},
        {"size": (8,) * 5, "stride": (16, 128, 1024, 8192), "box": (8,) * 5},
        {"data_type": UINT8, "box": (256, 1), "size": (256, 1), "swizzle": NO_SWIZZLE},
        {"swizzle": SWIZZLE_64B, "box": (32, 8)},
        {"swizzle": SWIZZLE_32B, "box": (16, 8)},
        {"fill": 1},
        {"promotion": 3},
        cube(interleave=INTERLEAVE_16B, swizzle=SWIZZLE_64B, box=(4, 8, 8)),
        cube(interleave=INTERLEAVE_32B, swizzle=SWIZZLE_32B),
    ],
)
def test_maps_that_are_valid(encode, arguments):
    assert encode(**arguments) == SUCCESS, last_message()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skew": 32}, "tensorMap"),
        ({"data_type": 16}, "tensorDataType is 16"),
        ({"rank": 0}, "tensorRank is 0"),
        ({"rank": 6}, "tensorRank is 6"),
        ({"address": 0x1008}, "globalAddress"),
        ({"size": (0, 100)}, "globalDim[0] is 0"),
        ({"size": (64, 2**32 + 1)}, "globalDim[1]"),
        ({"stride": (136,)}, "globalStrides[0] is 136"),
        ({"stride": (2**40,)}, "globalStrides[0]"),
        ({"box": (0, 8)}, "boxDim[0] is 0"),
        ({"box": (64, 257)}, "boxDim[1] is 257"),
        ({"box": (4, 8)}, "boxDim[0] in bytes is 8"),
        ({"box": (72, 8)}, "boxDim[0] in bytes is 144"),
        ({"box": (40, 8), "swizzle": SWIZZLE_64B}, "at most the swizzle's 64"),
        ({"box": (24, 8), "swizzle": SWIZZLE_32B}, "at most the swizzle's 32"),
        ({"element_stride": (1, 0)}, "elementStrides[1] is 0"),
        ({"element_stride": (1, 9)}, "elementStrides[1] is 9"),
        ({"interleave": 3}, "interleave is 3"),
        ({"swizzle": 7}, "swizzle is 7"),
        ({"promotion": 4}, "l2Promotion is 4"),
        ({"fill": 2}, "oobFill is 2"),
        ({"fill": 1, "data_type": UINT16}, "oobFill is 1"),
        ({"interleave": INTERLEAVE_16B}, "tensorRank is 2"),
        (cube(interleave=INTERLEAVE_32B, swizzle=SWIZZLE_64B), "swizzle is 2"),
        (cube(interleave=INTERLEAVE_32B, swizzle=SWIZZLE_32B, address=0x1010), "globalAddress"),
        (cube(interleave=INTERLEAVE_32B, swizzle=SWIZZLE_32B, stride=(144, 1024)), "globalStrides[0]"),
        (cube(interleave=INTERLEAVE_16B, element_stride=(0, 1, 1)), "elementStrides[0] is 0"),
        ({"size": (64, 100), "stride": None}, "globalStrides is null"),
        ({"box": None}, "boxDim is null"),
    ],
)
def test_maps_that_are_not(encode, arguments, message):
    assert encode(**arguments) == INVALID_VALUE
    assert message in last_message()


def test_what_is_not_emulated(encode):
    assert encode(data_type=PACKED_U4) == NOT_SUPPORTED
    assert "packed" in last_message()
    Machine("l4")
    assert encode() == NOT_SUPPORTED
    assert "compute capability 9.0" in last_message()


def test_a_failed_encoding_is_no_error_of_the_runtime(cuda, encode):
    assert encode(rank=0) == INVALID_VALUE
    assert cuda.cudaGetLastError() == CudaError.SUCCESS
