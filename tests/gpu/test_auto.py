"""Which path "auto" takes: timed once, remembered on disk, and never against a rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_lora
from fused_lora import lora_linear
from tests.operands import BF16, F64, check_against_torch, operands

ROOT = Path(__file__).parent.parent.parent
CALL = """
import torch, fused_lora
from tests.operands import BF16, forward_and_backward, operands
given = operands((512,), 512, 256, 16, BF16, BF16, bias=False).to("cuda")
forward_and_backward(fused_lora.lora_linear, given)
print(fused_lora.explain("cuda", rows=512, in_features=512, out_features=256, rank=16, adapter_dtype=BF16))
"""


def in_a_process_of_its_own(cache, code=CALL, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "FUSED_LORA_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_choice_is_timed_once_and_remembered(cuda, tmp_path):
    cache = tmp_path / "choices"
    first = in_a_process_of_its_own(cache)
    assert first.count("(timed now)") == 2  # forward and backward
    (file,) = cache.glob("*.json")
    rows = json.loads(file.read_text())
    assert len(rows) == 2
    for row in rows.values():
        assert row["fused_ms"] > 0
        assert row["composed_ms"] > 0
        assert row["path"] == ("fused" if row["fused_ms"] <= row["composed_ms"] else "composed")
    written = file.stat().st_mtime_ns
    assert in_a_process_of_its_own(cache).count("(remembered)") == 2
    assert file.stat().st_mtime_ns == written


def test_a_remembered_choice_is_followed(cuda, tmp_path):
    cache = tmp_path / "choices"
    in_a_process_of_its_own(cache)
    (file,) = cache.glob("*.json")
    for path in ("fused", "composed"):
        rows = {shape: {**row, "path": path} for shape, row in json.loads(file.read_text()).items()}
        file.write_text(json.dumps(rows))
        assert in_a_process_of_its_own(cache).count(f"{path}: fused took") == 2


def test_timing_can_be_switched_off(cuda, tmp_path):
    printed = in_a_process_of_its_own(tmp_path, FUSED_LORA_TIMING="0")
    assert printed.count("not timed (FUSED_LORA_TIMING=0)") == 2
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_ignored_with_a_warning(cuda, tmp_path):
    in_a_process_of_its_own(tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text("{")
    with_warnings = "import warnings; warnings.simplefilter('always')\n" + CALL
    assert in_a_process_of_its_own(tmp_path, with_warnings).count("(timed now)") == 2
    assert len(json.loads(file.read_text())) == 2


def test_deterministic_algorithms_ask_no_clock_and_no_file(cuda, tmp_path):
    code = "import torch; torch.use_deterministic_algorithms(True)\n" + CALL
    printed = in_a_process_of_its_own(tmp_path, code, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert printed.count("deterministic algorithms") == 2
    assert not list(tmp_path.iterdir())


def test_whatever_is_chosen_is_right(cuda):
    with fused_lora.use_path("auto"):
        check_against_torch(operands((300,), 256, 192, 16, BF16, dropout_p=0.1).to(cuda), lora_linear)
        check_against_torch(operands((30,), 25, 19, 3, BF16).to(cuda), lora_linear)
        check_against_torch(operands((30,), 24, 16, 3, F64).to(cuda), lora_linear)


def test_explain_tells_the_gpu_and_the_kernels(cuda):
    told = fused_lora.explain("cuda", rows=4096, in_features=4096, out_features=4096, adapter_dtype=BF16)
    assert torch.cuda.get_device_name() in told
    assert "tensor cores" in told


def test_float64_is_refused_by_name_where_there_are_no_kernels(cuda):
    given = operands((4,), dtype=F64).to(cuda)
    with fused_lora.use_path("fused"), pytest.raises(RuntimeError, match=r"no fused kernels for .*float64"):
        lora_linear(*given.tensors, **given.options)
