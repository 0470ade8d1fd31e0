"""The tests of tests/gpu are right as far as a machine without a GPU can tell: what does not need CUDA itself
passes on the CPU, and all of it is skipped there, with the reason, when it is run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run_gpu_tests(**environment):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_what_does_not_need_cuda_passes_on_the_cpu():
    printed = run_gpu_tests(FUSED_LORA_GPU_TESTS_ON="cpu")
    passed = re.search(r"(\d+) passed", printed)
    assert passed, printed[-2000:]
    assert int(passed[1]) > 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they run")
def test_without_a_gpu_they_are_skipped_with_the_reason():
    printed = run_gpu_tests()
    assert "no GPU: torch.cuda.is_available() is False" in printed
    assert re.search(r"\d+ skipped\b", printed)
    assert not re.search(r"\d+ passed\b", printed)
    assert " passed" not in printed
