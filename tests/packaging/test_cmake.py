"""The kernels without torch: CMake builds the library, its C++ tests and the profiling program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator import native, toolchain

ROOT = Path(__file__).parent.parent.parent
BUILD = toolchain.CACHE.parent / "cmake-test"

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*command: object, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def build():
    """A build of PTX alone: machine code is what the package's own build makes, and takes twice the time.

    Uncompressed, so that the stand-in for the CUDA runtime reads it.
    """
    try:
        toolkit = toolchain.find_toolkit()
    except toolchain.ToolkitMissing as missing:
        pytest.skip(str(missing))
    if toolkit.origin != "system":
        pytest.skip("CMake finds no complete CUDA toolkit in PyPI's packages")
    ninja = Path(sys.executable).with_name("ninja")
    succeed(
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja"),
        *((f"-DCMAKE_MAKE_PROGRAM={ninja}",) if ninja.exists() else ()),
        f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=80-virtual",
        "-DCMAKE_CUDA_FLAGS=--no-compress",
    )
    succeed("cmake", "--build", BUILD)
    return BUILD


def test_the_cpp_tests_pass(build):
    done = run("ctest", "--test-dir", build, "--output-on-failure")
    assert done.returncode == 0, done.stdout[-8000:]
    tests = sorted(path.stem for path in (ROOT / "tests" / "cpp").glob("test_*.cpp"))
    assert tests
    for name in tests:
        assert f" {name} " in done.stdout


def test_the_profiling_program_runs_forward_and_backward(build):
    """On the emulated GPU, whose runtime takes the place of CUDA's. Its clock stands still."""
    printed = succeed(
        *(build / "profile_lora", "--rows", 40, "--in", 64, "--out", 48, "--rank", 8, "--bias"),
        *("--dropout", 0.25, "--warm-up", 0, "--iterations", 1),
        LD_PRELOAD=str(native.build_library()),
    )
    lines = printed.splitlines()
    assert "compute capability 8.0, 108 multiprocessors" in lines[0]
    for half in ("forward", "backward"):
        assert any(line.startswith(f"{half}: ") and "launch" in line for line in lines)
        assert f"{half}: 0.0 us, " in printed


def test_it_adds_to_what_a_frozen_layer_gave(build):
    printed = succeed(
        *(build / "profile_lora", "--rows", 40, "--in", 64, "--out", 48, "--rank", 8, "--base"),
        *("--warm-up", 0, "--iterations", 1),
        LD_PRELOAD=str(native.build_library()),
    )
    assert printed.count("rank-up: tensor cores") == 2
    assert "lora-gemm" not in printed


@pytest.mark.parametrize("device", ["a100", "h100", "l4", "rtx4090", "b200", "rtx5090"])
def test_it_prints_a_plan_without_a_gpu(build, device):
    printed = succeed(build / "profile_lora", "--plan", device, "--rows", 8192, CUDA_VISIBLE_DEVICES="")
    assert "tensor cores" in printed
    assert "forward: 2 launches" in printed


def test_without_a_gpu_it_says_so(build):
    done = run(build / "profile_lora", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stderr.startswith("profile_lora: no GPU to run on (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "x"], "--rank takes a whole number of at least 1, got 'x'"),
        (["--rows", "-1"], "--rows takes a whole number of at least 0, got '-1'"),
        (["--dropout", "2"], "--dropout takes a number from 0 to 1, got '2'"),
        (["--dtype", "int8"], "--dtype takes one of bf16, fp16, fp32, got 'int8'"),
        (["--rank"], "--rank takes a value"),
        (["--fast"], "unknown option '--fast'"),
    ],
)
def test_a_bad_command_line_is_refused(build, arguments, message):
    done = run(build / "profile_lora", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"profile_lora: {message}\n")
