"""`python -m tests.emulator` shows a kernel and a run of it, and explains what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulator.__main__ import main
from tests.emulator.native import library

SOURCE = """
extern "C" __global__ void scale(const float* x, float* y, float a, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i];
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    library()  # built where it always is, before the cache of compiled kernels moves
    monkeypatch.setattr("tests.emulator.toolchain.CACHE", tmp_path / "cache")
    path = tmp_path / "scale.cu"
    path.write_text(SOURCE)
    return path


RUN = ["--run", "scale", "--grid", "4", "--block", "128", "--args"]


def test_kernels_and_the_compilers_report_are_shown(source, capsys):
    assert main([str(source), "--block", "128"]) == 0
    out = capsys.readouterr().out
    assert "kernel scale" in out
    assert "parameters: 8 bytes, 8 bytes, 4 bytes, 4 bytes" in out
    assert "registers" in out


def test_a_clean_run_is_summed_up(source, capsys):
    assert main([str(source), *RUN, "f32[512]", "out:f32[512]", "2.0", "512"]) == 0
    out = capsys.readouterr().out
    assert "grid (4, 1, 1), block (128, 1, 1): 0 findings" in out
    assert "global sectors 128 (ideal 128)" in out
    assert "read 2048 bytes (2048 of them once)" in out


def test_findings_are_shown_and_fail(source, capsys):
    assert main([str(source), *RUN, "f32[500]", "out:f32[512]", "2.0", "512"]) == 1
    out = capsys.readouterr().out
    assert "out of bounds: scale PTX line" in out
    assert "(scale.cu:4)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "missing"], "no kernel `missing` in the module; it has: scale"),
        ([*RUN, "f32[512]"], "takes 4 arguments, not 1"),
        ([*RUN, "f33[512]", "0", "0", "0"], "not 'f33'"),
        ([*RUN, "many", "0", "0", "0"], "neither a number nor TYPE[SHAPE]: 'many'"),
        (["--block", "4096", "--run", "scale", "--args", "0", "0", "0.0", "0"], "4096"),
    ],
)
def test_bad_input_is_explained(source, arguments, message, capsys):
    assert main([str(source), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none.ptx")]) == 2
    assert "none.ptx" in capsys.readouterr().err
