from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import fused_lora
from fused_lora import paths

ON = os.environ.get("FUSED_LORA_GPU_TESTS_ON", "cuda")


def missing() -> str | None:
    """Why the tests of this folder cannot run; None where they can."""
    if not torch.cuda.is_available():
        return f"no GPU: torch.cuda.is_available() is False (torch {torch.__version__})"
    problem = paths.obstacle("fused", "cuda")
    return None if problem is None else f"no kernels for this GPU: {problem}"


def pytest_collection_modifyitems(items):
    """Skips before any fixture: there are hundreds of tests here."""
    here = Path(__file__).parent
    reason = missing() if ON == "cuda" else None
    seen: Counter[str] = Counter()
    for item in items:
        if here not in item.path.parents:
            continue
        seen[item.originalname] += 1
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif ON == "cpu" and "cuda" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="needs CUDA itself"))
        elif ON == "cpu" and seen[item.originalname] > 6:
            item.add_marker(pytest.mark.skip(reason="enough was run to see that the test is right"))


@pytest.fixture
def cuda():
    """For tests of CUDA itself."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device():
    return torch.device("cpu") if ON == "cpu" else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["fused", "composed"])
def path(request, device):
    """Every path that has a CUDA implementation, asked for by name."""
    if request.param == "fused" and device.type == "cpu":
        pytest.skip("the fused kernels are CUDA's")
    with fused_lora.use_path(request.param):
        yield request.param


@pytest.fixture
def fused(device):
    with fused_lora.use_path("fused" if device.type == "cuda" else "composed"):
        yield


@pytest.fixture(autouse=True)
def _no_timings_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path / "choices"))
