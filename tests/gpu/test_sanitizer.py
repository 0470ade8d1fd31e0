"""NVIDIA's compute-sanitizer finds nothing in the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_support.toolkit import find_system_toolkit

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sanitizer(cuda):
    toolkit = find_system_toolkit()
    beside_nvcc = toolkit.root / "bin" / "compute-sanitizer" if toolkit else None
    if beside_nvcc is not None and beside_nvcc.exists():
        return str(beside_nvcc)
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is neither in the CUDA toolkit nor on the PATH")
    return tool


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(sanitizer, tool):
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.calls"],
        cwd=ROOT,
        # An allocation for each tensor: the allocator's cache would hide what lies outside of one.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "done" in done.stdout
