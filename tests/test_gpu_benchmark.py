"""The GPU benchmark, as far as it goes without a GPU: everything but the times is real."""

from __future__ import annotations

import csv
import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tables
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import output, results, sides, timing
from benchmarks.shapes import DECODE, TRAINING, Shape

pytest.importorskip("matplotlib")
COMPILED = sides._compiled
TINY = Shape("tiny", 3, 32, 16, rank=4)
RUN = results.Run("Fake GPU (80 GB)", "8.0", "2.14.1", "13.0", "0.21.2", "0.1.0", "abc", "2026-11-24")


class WallClock:
    """In place of events, on a CPU."""

    def prepare(self, step):
        return step

    def start(self, step):
        began = time.perf_counter()
        step()
        taken = time.perf_counter() - began
        return lambda: taken


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling takes ten seconds: one test of it is enough."""
    monkeypatch.setattr(sides, "_compiled", lambda layer: layer)


def test_pefts_layer_compiles_as_a_full_graph():
    layer = sides.pefts(torch.nn.Linear(8, 4, bias=False), Shape("tiny", 3, 8, 4, rank=2), 0.1, torch.float32)
    compiled = COMPILED(layer)
    assert compiled(torch.randn(3, 8)).shape == (3, 4)


@pytest.mark.parametrize(
    ("dtype", "backward"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_every_side_is_a_step_of_the_same_layer(backward, dtype):
    built = sides.build(TINY, dtype, 0.1 if backward else 0.0, "cpu", backward=backward)
    masters_sides = {sides.PEFT_MASTERS, sides.FUSED_MASTERS} if dtype == torch.float32 else set()
    assert set(built.steps) | set(built.missing) == set(sides.SIDES) - masters_sides
    assert set(built.missing) <= {sides.FUSED, sides.FUSED_MASTERS}, built.missing
    assert all("fused" in reason for reason in built.missing.values())
    for name, step in built.steps.items():
        result = step()
        if not backward:
            assert result.shape == (3, 16), name
            assert not result.requires_grad
            continue
        masters = torch.float32 if name in (sides.PEFT_MASTERS, sides.FUSED_MASTERS) else dtype
        wanted = [(TINY.rows, TINY.in_features, dtype)]
        if name != sides.FROZEN:
            wanted += [(TINY.rank, TINY.in_features, masters), (TINY.out_features, TINY.rank, masters)]
        assert [(*gradient.shape, gradient.dtype) for gradient in result] == wanted, name


def test_pefts_default_runs_its_adapters_in_the_autocast_dtype():
    """Where its float32 x is cast for every linear: the casts that the sequence of PEFT's default counts."""
    built = sides.build(TINY, torch.bfloat16, 0.0, "cpu", backward=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        built.steps[sides.PEFT_MASTERS]()
    casts = sum(event.name == "aten::_to_copy" for event in profile.events())
    assert casts >= 8


def test_a_side_that_cannot_run_is_left_out_with_the_reason(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(sides, "ours", fail)
    built = sides.build(TINY, torch.float32, 0.0, "cpu", backward=True)
    assert built.missing[sides.COMPOSED] == "RuntimeError: no such kernel"
    assert sides.FROZEN in built.steps


def test_sides_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times, failed = timing.interleaved(steps, rounds=4, timer=WallClock(), warm_up=2)
    assert order == list("abcbcacab" * 2)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert failed == {}


def test_a_side_that_cannot_be_captured_is_left_out_with_the_reason():
    class Picky(WallClock):
        def prepare(self, step):
            if step() == "bad":
                raise RuntimeError("operation not permitted when stream is capturing")
            return step

    steps = {"good": lambda: "good", "bad": lambda: "bad"}
    times, failed = timing.interleaved(steps, rounds=2, timer=Picky())
    assert list(times) == ["good"]
    assert failed == {"bad": "RuntimeError: operation not permitted when stream is capturing"}


class FakeCuda:
    """torch.cuda as CudaTimer uses it: calls are noted, and events are a millisecond apart."""

    def __init__(self, calls):
        self.calls = calls
        self.clock = itertools.count()
        self.capturing = False

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 10)

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("wait"))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("wait"))

    def stream(self, stream):
        return self._context("stream")

    def graph(self, graph):
        return self._context("capture")

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: self.calls.append("synchronize"))

        def record():
            event.at = next(self.clock)
            self.calls.append("record")

        event.record = record
        event.elapsed_time = lambda other: float(other.at - event.at)
        return event

    def _context(self, name):
        class Context:
            def __enter__(_):
                self.calls.append(name)

            def __exit__(_, *error):
                self.calls.append(f"end of {name}")

        return Context()


@pytest.mark.parametrize("graph", [False, True])
def test_events_enclose_the_step_alone_and_the_cache_is_cold(graph, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "cuda", FakeCuda(calls))
    timer = timing.CudaTimer(torch.device("cpu"), graph=graph)
    assert timer._flushed.numel() == 2 << 10
    monkeypatch.setattr(timer, "_flushed", SimpleNamespace(zero_=lambda: calls.append("flush")))
    step = timer.prepare(lambda: calls.append("step"))
    if graph:
        warm_up = ["wait", "stream", *["step"] * 3, "end of stream", "wait"]
        assert calls == [*warm_up, "capture", "step", "end of capture"]
    calls.clear()
    seconds = timer.start(step)
    assert calls == ["flush", "record", "replay" if graph else "step", "record"]
    assert seconds() == pytest.approx(1e-3)
    assert calls[-1] == "synchronize"


def test_ratios_are_paired_within_rounds():
    # The machine slows down threefold on the way: the ratio stays.
    ours, other = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]
    assert results.paired(other, ours) == (2.0, 2.0, 2.0)
    assert results.paired([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == (2.0, 3.0, 4.0)
    assert results.paired([3.0], [2.0]) == (1.5, 1.5, 1.5)
    assert all(value != value for value in results.paired([1.0], []))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        results.paired([1.0, 2.0], [1.0])


def fake_rows():
    times = {
        sides.FROZEN: [1e-3, 1e-3],
        sides.FUSED: [1.25e-3, 1.25e-3],
        sides.PEFT: [2e-3, 2e-3],
        sides.COMPOSED: [],
    }
    training = Shape("square 4096", 8192, 4096, 4096)
    decode = Shape("Llama-2-7B down", 1, 11008, 4096)
    both = results.rows("forward + backward", training, "bfloat16", 0.1, "graph", times)
    return both + results.rows("forward", decode, "bfloat16", 0.0, "graph", {sides.PEFT: [3e-5]})


def test_rates_are_of_the_frozen_products():
    frozen, fused, peft = fake_rows()[:3]
    assert [row.side for row in (frozen, fused, peft)] == [sides.FROZEN, sides.FUSED, sides.PEFT]
    assert frozen.tflops == pytest.approx(2 * 2 * 8192 * 4096 * 4096 / 1e-3 * 1e-12)
    assert frozen.gigabytes_per_second == pytest.approx(2 * 2 * (2 * 8192 * 4096 + 4096 * 4096) / 1e-3 * 1e-9)
    assert peft.over_frozen == 2.0
    assert peft.over_fused == pytest.approx(1.6)


def test_table_csv_and_plot_carry_the_device(tmp_path):
    rows = fake_rows()
    paths = output.write(
        RUN, rows, ["composed: RuntimeError: x", "composed: RuntimeError: x"], tmp_path / "out"
    )
    assert [path.name for path in paths] == [f"fake-gpu-80-gb{suffix}" for suffix in (".md", ".csv", ".png")]
    text = paths[0].read_text()
    assert text.startswith("# Fake GPU (80 GB)\n")
    assert text.count("- composed: RuntimeError: x") == 1
    (line,) = (line for line in text.splitlines() if line.startswith("| square 4096 8192×4096→4096"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["1000.0", "1250.0"]
    assert cells[4:] == ["0.80 (0.80–0.80)", "1.60 (1.60–1.60)"]
    assert "| Llama-2-7B down 1×11008→4096 |         – |        – |" in text
    with paths[1].open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert {line["device"] for line in lines} == {RUN.device}
    assert (lines[0]["m"], lines[0]["in_features"], lines[0]["side"]) == ("8192", "4096", sides.FROZEN)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_still_writes(tmp_path):
    for path in output.write(RUN, [], ["fused: RuntimeError: none"], tmp_path):
        assert path.exists()


def test_the_whole_run_on_a_cpu(tmp_path):
    """All but the GPU: shapes, sides, turns, rows, files."""
    asked = command.parse(["--rounds", "2", "--dtype", "float32", "--out", str(tmp_path)])
    told = []
    small = [Shape("tiny", 2, 16, 8, rank=2)]
    rows, notes = command.measure(
        asked, torch.device("cpu"), WallClock(), report=told.append, training=small, decode=small
    )
    assert len(told) == 4  # two dropouts, forward of the training shapes, decode
    assert {row.half for row in rows} == {"forward", "forward + backward"}
    assert all(row.microseconds > 0 for row in rows)
    assert all(note.startswith(sides.FUSED) for note in notes)
    output.write(command.describe("a CPU", (0, 0)), rows, notes, tmp_path)
    assert (tmp_path / "a-cpu.csv").exists()


def test_shapes_are_those_of_the_paper_and_of_decoding():
    assert {(s.in_features, s.out_features) for s in TRAINING} == {(n, n) for n in (4096, 5120, 8192)}
    assert {s.rows for s in TRAINING} == {2048, 4096, 6144, 8192}
    assert {s.rows for s in DECODE} == {1, 4, 16, 64}
    assert {s.rank for s in (*TRAINING, *DECODE)} == {16}


def test_quick_takes_the_ends_of_each_set():
    asked = command.parse(["--quick", "--dropout", "0.1"])
    assert asked.rounds == 10
    planned = list(command._plan(asked, TRAINING, DECODE))
    assert [shape for _, shape, _ in planned] == [*[TRAINING[0], TRAINING[-1]] * 2, DECODE[0], DECODE[-1]]


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--dropout", "1.0"], ["--dtype", "int8"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "needs a CUDA GPU" in told.err
    assert "Nothing was measured" in told.err


def test_without_fused_kernels_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.paths, "obstacle", lambda path, device: f"no {path} on {device}")
    assert command.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu has no fused kernels to measure: no fused on cuda\n"


def test_markdown_is_aligned():
    table = tables.markdown(["a", "bb"], [["long name", "1"], ["x", "12.5"]])
    assert table.splitlines() == [
        "| a         |   bb |",
        "|-----------|-----:|",
        "| long name |    1 |",
        "| x         | 12.5 |",
    ]
