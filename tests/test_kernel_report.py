"""What benchmarks.kernels prints: counts from the emulator, facts from the compiler, predictions."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import kernels, static_facts, traffic
from benchmarks.shapes import Shape
from tests.emulator.toolchain import ToolkitMissing, find_toolkit


@pytest.fixture
def toolkit():
    try:
        find_toolkit()
    except ToolkitMissing as missing:
        pytest.skip(str(missing))


def test_counted_bytes_are_the_planned_ones(toolkit):
    """8u + 6v + 4w in 2 + 4 launches, and terms in the rank."""
    shape = Shape("", 160, 128, 96, rank=8)
    launches = traffic.measure(shape, dropout=0.1)
    assert [it.half for it in launches].count("forward") == 2
    assert [it.half for it in launches].count("backward") <= 4
    assert sum(it.u for it in launches) == pytest.approx(8)
    assert sum(it.v for it in launches) == pytest.approx(6)
    assert sum(it.w for it in launches) == pytest.approx(4)
    assert all(it.long_total >= 0 and it.blocks >= 1 for it in launches)


def test_an_adapter_alone_moves_x_twice_dx_once_and_y_four_times(toolkit):
    """It reads what the frozen layer gave and writes y: 4v forward, and 2v of dy backward."""
    launches = traffic.measure(Shape("", 160, 128, 96, rank=8), dropout=0.1, frozen=False)
    assert sum(it.u for it in launches) == pytest.approx(6)
    assert sum(it.v for it in launches) == pytest.approx(6)
    assert not any(it.w for it in launches)


def test_a_group_reads_x_less_often_and_adds_dx_up_as_it_goes(toolkit):
    """x: once for h and thrice for y, once for dA. dx: written, and twice read and written."""
    grouped, apart = traffic.measure_group(Shape("", 160, 128, 0, rank=8), dropout=0.1)
    assert sum(it.u for it in grouped) == pytest.approx(2 + 3 * 2 + 2 + 2 + 2 * 4)
    assert sum(it.u for it in apart) == pytest.approx(3 * 8)
    for unit, times in (("v", 3 * 6), ("w", 3 * 4)):
        assert sum(getattr(it, unit) for it in grouped) == pytest.approx(times)
        assert sum(getattr(it, unit) for it in apart) == pytest.approx(times)
    assert len(grouped) == 1 + 3 + 3 * 2 + 2 < len(apart)


def test_the_gemm_reads_what_cutlasss_does_and_the_low_rank_operands(toolkit):
    shape = Shape("", 2048, 64, 2048, rank=8)
    text = traffic.report(shape, device="l4")
    assert text.count("| fused, planned ") == 2
    assert "| adapter of PEFT, dropout" in text
    assert "| in a group, counted " in text
    assert "| PEFT's default, dropout" in text
    line = text.splitlines()[-1]
    assert line.startswith("Forward GEMM of 128×128 tiles")
    assert "(+0)" in line


def test_names_are_short():
    mangled = "_ZN10fused_lora7kernels9lora_gemm6kernelINS1_6TraitsIfEEEEvNS1_6ParamsE"
    assert traffic.short_name(mangled) == "lora_gemm::kernel"
    hidden = "_ZN10fused_lora7kernels12_GLOBAL__N_15sumUpEPf"
    assert traffic.short_name(hidden) == "sumUp"
    assert traffic.short_name("plain_c") == "plain_c"


def test_static_facts_stand_beside_cutlasss(toolkit):
    text = static_facts.main_loop_report(["sm_80"])
    rows = [line for line in text.splitlines() if "| sm_80 |" in line]
    assert [row.split("|")[1].strip() for row in rows] == [
        "lora_gemm y (W N×K)",
        "lora_gemm dx (W N×K)",
        "CUTLASS x Wᵀ",
    ]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3:7] == ["0+0", "64", "16", "8"]
        assert cells[9] == "2"  # blocks on an A100
        assert cells[10:] == [""] * 5


def test_resources_count_instances(toolkit):
    source = static_facts.CSRC / "kernels" / "rank_grad" / "reduce_partials.cu"
    text = static_facts.resources_report([source], "sm_80")
    assert text.startswith("# Every kernel, sm_80")
    assert "| reduce_partials: " in text
    assert source in static_facts.all_sources()


def test_a_shape_is_read_or_refused():
    assert kernels.shape("8x64×32") == Shape("8x64×32", 8, 64, 32)
    for text in ("8x64", "8x0x4", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="a shape is like 2048x512x2048"):
            kernels.shape(text)


def test_the_command_prints_what_was_asked_for(capsys):
    assert kernels.main(["--only", "prediction", "--device", "a100"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# A prediction, not a measurement")
    assert "## A100" in printed
    assert "H100" not in printed


def test_a_missing_tool_is_told(capsys, monkeypatch):
    def missing(*_):
        raise ToolkitMissing("no nvcc")

    monkeypatch.setattr(static_facts, "main_loop_report", missing)
    assert kernels.main(["--only", "static"]) == 1
    assert capsys.readouterr().err == "benchmarks.kernels: no nvcc\n"
