"""The CPU benchmark: that the sides compute the same, take turns, and that what is said of them follows."""

from __future__ import annotations

import csv
import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch

import fused_lora
from benchmarks.cpu import __main__ as command
from benchmarks.cpu import batches, cases, formulations, goals, memory, models, output, peak, sides, turns
from benchmarks.cpu.cases import BOTH, DECODING, FORWARD, SMOLLM2, STEP, Case, Layer
from benchmarks.cpu.plan import Plan
from benchmarks.cpu.results import Measured, Result, Store
from benchmarks.cpu.session import Progress
from fused_lora import choices
from tests import models as families
from tests.operands import operands, torch_sequence

pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

LAYER = Layer(SMOLLM2, "tiny", 64, 32)
RUN = {"processor": "a processor", "torch": "2.13.0", "peft": "0.21", "fused_lora": "0.1", "commit": "abc"}
UNCOMPILED = [name for name in sides.OF_A_LAYER if name != sides.PEFT_COMPILED]
steady = pytest.fixture(families.steady, autouse=True)


def case(half=BOTH, rows=5, dtype="float32", dropout=0.0, layer=LAYER, rank=4, threads=1):
    return Case(threads, half, rank, dtype, dropout, layer, rows)


def called(built):
    """What each side's step returns: y, or the gradients of x, A and B."""
    found = {}
    for name, side in built.running.items():
        with side.context():
            found[name] = side.call()
    return found


# The sides compute the same


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("half", [FORWARD, BOTH])
def test_every_side_computes_the_same(half, dtype, bound):
    built = sides.build(case(half, dtype=dtype), UNCOMPILED)
    default = {sides.PEFT_DEFAULT, sides.MASTERS} if dtype == "float32" else set()
    packed = {sides.PACKED} if half == BOTH else set()
    assert set(built.absent) == {sides.NO_DROPOUT} | default | packed
    found = called(built)
    frozen = found.pop(sides.FROZEN)
    reference = found[sides.PEFT]
    for name, result in found.items():
        pairs = [(result, reference)] if half == FORWARD else zip(result, reference, strict=True)
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape, name
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error < bound, name
    # The adapter is seen in all of it: the frozen side's y and dx are others.
    pair = (frozen, reference) if half == FORWARD else (frozen[0], reference[0])
    assert (pair[0].double() - pair[1].double()).norm() > 0.1 * pair[1].double().norm()


def test_pefts_layer_compiles_and_computes_the_same():
    names = [sides.PEFT, sides.PEFT_COMPILED]
    built = sides.build(case(), names)
    assert not built.absent
    eager, compiled = called(built).values()
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [None, *formulations.ORDERS], ids=str)
def test_every_formulation_is_the_layer(order):
    given = operands((7,), 12, 10, 3, torch.float64, bias=False)
    layer = formulations.Formulation(given.weight, given.lora_a, given.lora_b, 1.5, order)
    given.x.requires_grad_()
    y = layer(given.x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [given.x, layer.a, layer.b], dy)
    leaves = [t.detach().requires_grad_() for t in (given.x, given.lora_a, given.lora_b)]
    exact = torch_sequence(leaves[0], given.weight, leaves[1], leaves[2], None, **given.options)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(found, torch.autograd.grad(exact, leaves, dy))


def test_runlora_takes_the_order_of_the_fewest_flops():
    assert formulations.best_order(16, 576, 576, 16) == formulations.Order(False, False, False)
    # rKN against Mr(K + N): merging W + s B A pays beyond KN / (K + N) = 288 rows, and so it does for dx,
    # where g is needed for dA anyway, beyond KN / K = 576.
    assert formulations.best_order(300, 576, 576, 16) == formulations.Order(True, False, False)
    assert formulations.best_order(2048, 576, 576, 16) == formulations.Order(True, True, False)
    # M (2K + 2N) r against MKN + 2rKN: dyᵀx pays at a high rank.
    assert formulations.best_order(2048, 64, 64, 48).wide_gradients


def test_flops_are_those_of_the_products():
    m, k, n, r = 5, 64, 32, 4
    assert case().frozen_flops == 2 * 2 * m * k * n
    low_rank = formulations.Order(False, False, False)
    recomputed_h = 2 * m * k * r  # by a formulation that saves x alone
    sizes = (m, k, n, r)
    counted = low_rank.forward_flops(*sizes) + low_rank.backward_flops(*sizes)
    assert case().flops == counted - recomputed_h
    assert case(FORWARD).flops == low_rank.forward_flops(*sizes)


def test_with_dropout_the_formulations_without_it_are_absent():
    built = sides.build(case(dropout=0.1), UNCOMPILED)
    assert built.absent[sides.ADDMM] == built.absent[sides.RUNLORA] == "has no dropout"
    assert sides.NO_DROPOUT in built.running
    found = called(built)
    assert not torch.equal(found[sides.AUTO][0], found[sides.NO_DROPOUT][0])


def test_a_side_that_fails_is_absent_with_the_reason(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(sides, "ours", fail)
    built = sides.build(case(), [sides.FROZEN, sides.FUSED])
    assert built.absent == {sides.FUSED: "RuntimeError: no such kernel"}
    assert list(built.running) == [sides.FROZEN]


def test_a_path_is_forced_and_autos_choice_is_told():
    built = sides.build(case(rows=16), [sides.COMPOSED, sides.AUTO])
    with built.running[sides.COMPOSED].context():
        assert fused_lora.paths.asked() == "composed"
    assert fused_lora.paths.asked() == "auto"
    assert built.running[sides.AUTO].note == "forward fused, backward fused"


def test_defaults_casts_are_paid_in_every_call():
    """A and B change with every step of a training, so a cast that autocast keeps would flatter."""
    side = sides.build(case(dtype="bfloat16"), [sides.PEFT_DEFAULT]).running[sides.PEFT_DEFAULT]

    def casts(calls):
        with side.context(), torch.profiler.profile() as profile:
            for _ in range(calls):
                side.call()
        return sum(event.name == "aten::_to_copy" for event in profile.events())

    assert casts(3) == 3 * casts(1) > 0


# Memory


def test_saved_bytes_leave_out_what_is_there_anyway():
    x, w, b = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8), torch.randn(4, 8)
    assert memory.saved_bytes(lambda: (x @ w) * b, [x, w]) == b.untyped_storage().nbytes()
    assert memory.saved_bytes(lambda: ((x @ w) * b).sum().backward(), [x, w, b]) == 0


def test_peak_bytes_count_what_is_alive_together():
    def peak_of(*sizes):  # one after the other, the last ones together
        for size in sizes[:-2]:
            torch.empty(size, dtype=torch.uint8)
        return [torch.empty(size, dtype=torch.uint8) for size in sizes[-2:]]

    made = {
        "low": turns.Side(functools.partial(peak_of, 3000, 1000, 512)),
        "high": turns.Side(functools.partial(peak_of, 1000, 3000, 512)),
    }
    assert memory.peak_bytes(made) == {"low": 3000, "high": 3512}
    assert memory.highest([5, -5, 3, 4, -7]) == 7


def test_a_layers_memory():
    built = sides.build(case(rows=32), [sides.FROZEN, sides.AUTO, sides.ADDMM])
    assert built.saved == {sides.FROZEN: 0, sides.AUTO: 32 * 4 * 4, sides.ADDMM: 0}  # h: rows×r
    y, dx = 4 * 32 * 32, 4 * 32 * 64
    assert memory.peak_bytes(built.running)[sides.FROZEN] == y + dx


# Turns


class Clock:
    """Stands still but for what steps take."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def side(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return turns.Side(call)


def test_no_order_of_sides_is_favoured():
    clock = Clock()
    taken = turns.Turns({name: clock.side(name, 1.0) for name in "abc"}, clock)
    for _ in range(120):
        taken.round()
    assert taken.seconds == {name: [1.0] * 120 for name in "abc"}
    rounds = ["".join(clock.calls[i : i + 3]) for i in range(0, 360, 3)]
    assert all(later == earlier[::-1] for earlier, later in zip(rounds[::2], rounds[1::2], strict=True))
    orders = [rounds.count("".join(order)) for order in itertools.permutations("abc")]
    assert sum(orders) == 120
    assert all(12 <= count <= 28 for count in orders)  # of 20
    for name in "abc":  # late as often as early
        assert sum(it.index(name) for it in rounds) == 120


def test_orders_are_the_same_in_every_run():
    orders = []
    for _ in range(2):
        clock = Clock()
        taken = turns.Turns({name: clock.side(name, 1.0) for name in "abcdef"}, clock)
        for _ in range(5):
            taken.round()
        orders.append(clock.calls)
    assert orders[0] == orders[1]


def test_short_calls_are_timed_in_groups():
    clock = Clock()
    made = {"short": clock.side("short", 1e-5), "long": clock.side("long", 0.5)}
    taken = turns.Turns(made, clock)
    round_seconds = taken.calibrate()
    assert taken.calls["short"] == pytest.approx(turns.GROUP_SECONDS / 1e-5, abs=1)
    assert taken.calls["long"] == 1
    assert round_seconds == pytest.approx(0.5 + turns.GROUP_SECONDS, rel=0.01)
    taken.round()
    assert taken.seconds["short"] == [pytest.approx(1e-5)]


def test_the_context_is_entered_outside_the_clock():
    clock = Clock()

    class Slow:
        def __enter__(self):
            clock.now += 100

        def __exit__(self, *error):
            pass

    taken = turns.Turns({"a": turns.Side(clock.side("a", 1.0).call, Slow)}, clock)
    taken.round()
    assert taken.seconds == {"a": [1.0]}


def test_ratios_are_paired_within_rounds():
    """The machine becomes three times as slow on the way: the ratio stays."""
    clock = Clock()
    factor = iter([1, 1, 2, 2, 3, 3])
    made = {
        "a": clock.side("a", lambda: 2.0 * next(factor)),
        "b": clock.side("b", lambda: 1.0 * next(factor)),
    }
    taken = turns.Turns(made, clock)
    for _ in range(3):
        taken.round()
    assert turns.paired(taken.seconds["a"], taken.seconds["b"]) == turns.Spread(2.0, 2.0, 2.0)
    assert turns.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == turns.Spread(2.0, 3.0, 4.0)
    assert turns.Spread.of([3.0]) == turns.Spread(3.0, 3.0, 3.0)
    assert turns.Spread(2.0, 4.0, 6.0).noise == 0.5
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        turns.paired([1.0, 2.0], [1.0])


def test_rounds_fill_the_budget_and_are_five_at_least():
    assert turns.rounds_within(1.0, 0.1, most=25) == 10
    assert turns.rounds_within(1.0, 0.001, most=25) == 25
    assert turns.rounds_within(1.0, 9.0, most=25) == 5
    assert turns.rounds_within(1.0, 9.0, most=2) == 2


def test_the_peak_is_the_fastest_candidate(monkeypatch):
    clock = Clock()
    slow, fast = clock.side("slow", 2.0), clock.side("fast", 1.0)
    monkeypatch.setattr(peak, "_candidates", lambda dtype: [(slow, 100.0), (fast, 90.0)])
    monkeypatch.setattr(peak.time, "perf_counter", clock)
    assert peak.peak.__wrapped__("float32", 1) == (fast, 90.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_for_the_peak_compute_a_product(dtype, monkeypatch):
    monkeypatch.setattr(peak, "SIZES", (64,))
    made = [side.call().float() for side, flops in peak._candidates(dtype) if flops == 2 * 64**3]
    assert made
    assert all(it.shape == (64, 64) for it in made)
    if torch.backends.mkldnn.is_available():
        # In pairs of the same operands: torch's linear, and oneDNN's with the weight prepacked.
        torch.testing.assert_close(made[0], made[1], rtol=2e-2, atol=2e-2)


# Results


def result(of, seconds, **more):
    made = {name: Measured((s, s, s), of.flops) for name, s in seconds.items()}
    return Result(of, {**made, **more})


def test_rows_say_the_ratios(tmp_path):
    made = result(case(), {sides.FROZEN: 2.0, sides.PEFT: 6.0, sides.AUTO: 3.0})
    row = made.rows()[2]
    assert (row["side"], row["in_features"], row["rows"], row["threads"]) == (sides.AUTO, 64, 5, 1)
    assert (row["time_over_frozen"], row["speedup_over_peft"]) == ("1.5", "2")
    assert (row["microseconds"], row["microseconds_low"]) == ("3e+06", "3e+06")
    store = Store.begin(tmp_path / "new" / "results.csv", RUN)
    store.add(made)
    with store.path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["commit"] for line in lines] == ["abc"] * 3
    assert [line["seconds"] for line in lines] == ["2.0 2.0 2.0", "6.0 6.0 6.0", "3.0 3.0 3.0"]


def stored(path):
    """Two cases, of which one has a side that is absent."""
    store = Store.begin(path, RUN)
    first = result(case(), {sides.FROZEN: 0.1, sides.PEFT: 0.2}, fused=Measured(note='says "no", and more'))
    whole_model = Layer(SMOLLM2, "o_proj+fc2")
    second = result(case(STEP, layer=whole_model), {sides.FROZEN: 0.3, sides.PEFT: 0.4})
    second = replace(
        second, sides={n: replace(m, flops=None, saved_bytes=7) for n, m in second.sides.items()}
    )
    for it in (first, second):
        store.add(it)
    return store


def test_results_come_back_from_the_file(tmp_path):
    path = tmp_path / "results.csv"
    assert Store.resume(path, RUN).results == []  # nothing to resume: a new one
    store = stored(path)
    assert Store.resume(path, RUN).results == store.results
    assert store.lacks(case(rows=6), [sides.FROZEN])
    assert store.lacks(case(), [sides.FROZEN, sides.COMPOSED])
    assert not store.lacks(case(), [sides.FROZEN, sides.FUSED])


def test_a_row_that_was_cut_is_measured_again(tmp_path):
    path = tmp_path / "results.csv"
    store = stored(path)
    cut, wanted = store.results[1].case, [sides.FROZEN, sides.PEFT]
    path.write_text(path.read_text()[:-5])
    resumed = Store.resume(path, RUN)
    assert resumed.lacks(cut, wanted)
    resumed.drop([cut, case(rows=6)])
    assert Store.resume(path, RUN).results == store.results[:1]
    resumed.add(store.results[1])
    assert Store.resume(path, RUN).results == store.results


def test_figures_of_another_machine_or_build_do_not_mix(tmp_path):
    path = tmp_path / "results.csv"
    stored(path)
    with pytest.raises(ValueError, match="its commit is 'abc', and now it is 'def'"):
        Store.resume(path, {**RUN, "commit": "def"})


def test_a_new_run_keeps_the_previous_file(tmp_path):
    path = tmp_path / "results.csv"
    stored(path)
    text = path.read_text()
    assert Store.begin(path, RUN).results == []
    assert (tmp_path / "previous-results.csv").read_text() == text


# Goals


def planted(auto=0.9, dropout_price=1.0, packed=0.5):
    """Results of every kind that a goal is about: the frozen linear takes 1, PEFT 2."""
    for layer in (cases.LAYERS[0], cases.LAYERS[4]):
        for rows in (16, 128):
            for half in (FORWARD, BOTH):
                for dropout in (0.0, 0.1):
                    of = case(half, rows, "bfloat16", dropout, layer, rank=16)
                    taken = auto * dropout_price if dropout else auto
                    seconds = {sides.FROZEN: 1.0, sides.PEFT: 2.0, sides.PEFT_DEFAULT: 2.5}
                    seconds |= {sides.PEFT_COMPILED: 1.9, sides.AUTO: taken, sides.MASTERS: 1.0}
                    seconds |= {sides.NO_DROPOUT: auto} if dropout else {}
                    seconds |= {sides.PACKED: packed} if half == FORWARD and rows == 16 else {}
                    gemm = Measured((0.8 * auto,) * 3, of.flops)
                    yield result(of, seconds, **{sides.PEAK: gemm} if rows == 128 else {})
    for of in cases.model_cases(("o_proj", "all"), (16,), cases.DTYPES, 2):
        if of.half == STEP:
            yield result(of, {sides.FROZEN: 1.0, sides.PEFT: 1.3, sides.AUTO: auto})


def reached(**times):
    return [goal.reached for goal in goals.evaluate(list(planted(**times)))]


def test_goals_are_reached_or_not():
    names = [goal.name for goal in goals.evaluate([])]
    assert all(goal.reached is None for goal in goals.evaluate([]))
    found = goals.evaluate(list(planted()))
    assert [goal.name for goal in found] == names
    told = {goal.name: goal for goal in found}
    only_below = {name for name, goal in told.items() if not goal.reached}
    # 2 / 0.9 = 2.2 of PEFT and 0.8 of the peak, which is less than 85 %; packed 4 times as fast as PEFT.
    assert [name for name in names if name in only_below] == [names[12]]
    assert "share of the GEMM peak" in names[12]
    assert told[names[4]].found == "2.22"
    assert told[names[12]].found == "80%; 0 shapes reach it"
    assert told[names[0]].worst.startswith("2.22 (2.22–2.22): forward, SmolLM2-135M 576→576, 16 rows")


def test_goals_are_missed_where_they_should_be():
    slow = reached(auto=2.1)
    assert slow[:4] == [False, True, True, False]  # 2 / 2.1 of PEFT; 2.5 of the default; 1.9 of the compiled
    assert slow[4:6] == [False, False]
    assert slow[8:10] == [False, False]  # of the frozen linear
    assert slow[15:] == [False, False, False]  # of the whole model
    assert reached(auto=0.98)[15:] == [False, True, True]  # 1.33 of PEFT, in float32 and in bfloat16
    assert reached(dropout_price=1.07)[13:15] == [False, True]  # of wide layers, of others
    assert reached(dropout_price=1.11)[13:15] == [False, False]
    assert reached(packed=0.6)[10:12] == [False, True]


def test_four_fifths_of_the_shapes_are_enough_against_the_frozen_linear():
    def share(slow):
        rows = range(2, 12)
        made = [result(case(BOTH, m, rank=16), {sides.FROZEN: 1.0, sides.AUTO: 0.9}) for m in rows]
        for index in range(slow):
            made[index] = result(made[index].case, {sides.FROZEN: 1.0, sides.AUTO: 1.5})
        return goals.evaluate(made)[8]

    assert share(2).reached
    assert share(2).found.startswith("80%")
    assert not share(3).reached


def test_a_miss_within_the_noise_is_told_from_one_beyond_it():
    noisy = Result(case(), {sides.PEFT: Measured((1.0, 0.9, 1.3)), sides.AUTO: Measured((1.01, 1.0, 1.0))})
    sure = Result(case(rows=6), {sides.PEFT: Measured((0.8,) * 3), sides.AUTO: Measured((1.0,) * 3)})
    goal = goals.evaluate([noisy, sure])[0]
    assert goal.found == "2 below, 1 of them with both quartiles"
    assert not goal.reached


# What comes out


def test_tables_say_every_shape_and_who_is_absent():
    made = [*planted(), result(case(), {sides.FROZEN: 1.0}, addmm_=Measured(note="has no dropout"))]
    details, summary = output.details(made), output.summary(RUN, made)
    assert "| SmolLM2-135M 576→576 |   16 |" in details
    assert "0.90 (0.90–0.90)" in details  # auto over frozen
    assert "- addmm_: has no dropout" in details
    assert "commit abc" in summary
    marks = [line.strip("| ").split()[-1] for line in summary.splitlines() if "≥" in line or "≤" in line]
    assert marks == ["yes" if goal.reached else "no" for goal in goals.evaluate(made)]


def test_time_left_is_scaled_by_what_was_needed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("benchmarks.cpu.session.time.perf_counter", clock)
    one, two, three = (case(rows=rows) for rows in (1, 2, 3))
    progress = Progress({one: 1.0, two: 2.0, three: 3.0})
    clock.now = 10.0
    assert progress.after(one) == "[1/3, 50 s left]"
    clock.now = 120.0
    assert progress.after(two) == "[2/3, 2 min left]"


# Batches


@pytest.mark.parametrize("case", cases.batch_cases([4], ["float32"], [1])[:3], ids=str)
def test_the_sides_of_a_batch_compute_the_same_and_the_frozen_one_does_not(case):
    made = batches.build(case, batches.SIDES[case.half])
    assert not made.absent
    results = {}
    for name, side in made.running.items():
        with side.context():
            got = side.call()
        results[name] = got if case.half == cases.MIXED else got[0]  # y, or the gradient of x
    for name in set(results) - {sides.FROZEN}:
        torch.testing.assert_close(results[name], results[sides.PEFT], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(results[sides.FROZEN], results[sides.PEFT], rtol=1e-2, atol=1e-2)


def test_one_part_of_the_benchmark_may_be_asked_for():
    planned = {
        part: command.planned(command.parse(["--threads", "1", "--only", part])).cases
        for part in ("layers", "batches", "model")
    }
    assert {it.half for it in planned["batches"]} == {cases.MIXED, cases.SHARED}
    whole = command.planned(command.parse(["--threads", "1"])).cases
    assert whole == [it for part in planned.values() for it in part]


# The command


def test_the_grid_is_the_whole_one_and_the_short_run_a_part_of_it():
    full, short = (
        command.planned(command.parse(["--threads", "1", "2", *more])) for more in (["--full"], [])
    )
    layers = [it for it in full.cases if it.of_one_layer]
    assert len(layers) == 7 * 3 * 5 * 2 * 2 * 2 * 2  # layers, ranks, rows, dropouts, dtypes, threads, halves
    assert {it.layer.name for it in full.cases if it.whole_model} == set(cases.TARGETS)
    assert set(short.cases) < set(full.cases)
    assert {it.layer.model for it in short.cases} == {SMOLLM2}
    assert {(it.rank, it.half) for it in short.cases} == {
        (16, half) for half in (FORWARD, BOTH, cases.MIXED, cases.SHARED, STEP, DECODING)
    }
    assert sum(sides.PEFT_COMPILED in full.sides_of(it) for it in layers) == len(layers)
    compiled = [it for it in short.cases if sides.PEFT_COMPILED in short.sides_of(it)]
    assert {(it.half, it.rows, it.threads) for it in compiled} == {(BOTH, 512, 2)}
    dropouts = {(it.half, it.dropout) for it in short.cases if it.of_one_layer}
    assert dropouts == {(FORWARD, 0.0), (BOTH, 0.0), (BOTH, 0.1)}


def test_arguments_choose(capsys):
    asked = ["--layers", "576x1536", "100x50", "--r", "8", "--rows", "3", "--dtype", "bfloat16", "--dropout"]
    asked += ["0.1", "--threads", "1", "--only", "layers", "--sides", "auto", "--plan"]
    assert command.main(asked) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "forward + backward, SmolLM2-135M 576→1536, 3 rows, r=8, bfloat16, dropout 0.1, 1 thread"
    )
    assert ", layer 100→50, " in lines[3]
    assert last.startswith("4 cases, roughly ")
    plan = command.planned(command.parse(asked))
    assert plan.sides_of(plan.cases[0]) == [sides.FROZEN, sides.PEFT, sides.AUTO]


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "0"], ["--dropout", "1.0"], ["--dtype", "int8"], ["--layers", "gpt"], ["--budget", "0"]],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.fixture
def run_command(tmp_path, monkeypatch, capsys):
    """The command on two small cases; what it printed."""
    monkeypatch.setenv(choices.DIRECTORY_VARIABLE, "")  # the command sets its own

    def run(*more, code=0):
        small = ["--layers", "64x32", "--r", "4", "--rows", "3", "--dtype", "float32", "--dropout", "0"]
        small += ["--threads", "1", "--only", "layers", "--rounds", "2", "--sides", "auto", "fused"]
        assert command.main([*small, "--out", str(tmp_path), *more]) == code
        return capsys.readouterr()

    return run


def test_a_run_leaves_tables_figures_and_pictures(run_command, tmp_path):
    told = run_command()
    assert "[1/2, " in told.out
    assert "PEFT/auto " in told.out
    assert "## Goals" in told.out
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["half"], line["side"]) for line in lines] == [
        (half, side)
        for half in (FORWARD, BOTH)
        for side in (sides.FROZEN, sides.PEFT, sides.FUSED, sides.AUTO)
    ]
    assert all(len(line["seconds"].split()) == 2 and line["torch"] == torch.__version__ for line in lines)
    assert "over the frozen linear's" in (tmp_path / "table.md").read_text()
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "over-frozen-forward-backward-r4-threads1.png",
        "over-frozen-forward-r4-threads1.png",
        "peak-r4.png",
        "peft-over-forward-backward-r4-threads1.png",
        "peft-over-forward-r4-threads1.png",
        "saved-r4.png",
    ]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["machine_info"]["torch"] == torch.__version__
    assert written["commit_info"]
    assert len(written["results"]) == len(lines)
    assert len(written["goals"]) == len(goals.evaluate([]))
    forward, both = written["benchmarks"]
    assert forward["stats"]["rounds"] == 2
    assert set(both["extra_info"]) == {sides.FROZEN, sides.PEFT, sides.FUSED, sides.AUTO}
    # A round is all sides' turns.
    sums = [sum(side["seconds"][turn] for side in both["extra_info"].values()) for turn in range(2)]
    assert all(took > total for took, total in zip(both["stats"]["data"], sums, strict=True))


def test_a_run_resumes_where_it_was_interrupted(run_command, tmp_path):
    run_command()
    path = tmp_path / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]))  # the head, the first case and one side of the second
    told = run_command("--resume")
    assert "[1/1, 0 s left] forward + backward" in told.out
    resumed = path.read_text().splitlines(keepends=True)
    assert resumed[:5] == lines[:5]
    assert len(resumed) == len(lines)
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == len(lines) - 1
    told = run_command("--resume")
    assert "left]" not in told.out
    assert "## Goals" in told.out


def test_a_file_of_another_build_is_not_resumed(run_command, tmp_path):
    stored(tmp_path / "results.csv")
    assert "--resume: " in run_command("--resume", code=2).err


def test_a_file_in_the_way_is_named(run_command, tmp_path):
    (tmp_path / "file").touch()
    told = run_command("--out", str(tmp_path / "file"), code=2)
    assert f"--out {tmp_path / 'file'}: File exists" in told.err


def test_without_the_model_the_layers_are_measured(run_command, monkeypatch):
    plan = Plan([case(STEP), case(FORWARD)], rounds=2, budget=0.1, compile_all=False)
    monkeypatch.setattr(command, "planned", lambda asked: plan)
    monkeypatch.setattr(command.models, "obstacle", lambda: "not installed")
    told = run_command().out
    assert "Without the whole model: not installed" in told
    assert "[1/1, 0 s left] forward, SmolLM2-135M 64→32" in told


# The whole model


@pytest.fixture(scope="module")
def tiny_model():
    return families.tiny("llama", max_position_embeddings=256).requires_grad_(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_leave_the_step_and_the_text_as_they_are(tiny_model, dtype):
    base = tiny_model.to(getattr(torch, dtype))
    whole = Layer(SMOLLM2, "o_proj+fc2")
    built = models.build(case(STEP, dtype=dtype, layer=whole), models.sides_of(STEP), base)
    found = called(built)
    frozen, peft, auto = (found[name] for name in (sides.FROZEN, sides.PEFT, sides.AUTO))
    assert len(frozen) == 1
    assert len(peft) == len(auto) == 1 + 2 * 2
    bound = {"rtol": 2e-2, "atol": 1e-3} if dtype == "bfloat16" else {}
    for other in (peft, auto):
        torch.testing.assert_close(other[0], frozen[0], **bound)
    assert [it.dtype for it in auto] == [it.dtype for it in peft] == [getattr(torch, dtype)] * 5
    assert built.saved[sides.PEFT] > 0
    decoded = called(models.build(case(DECODING, 1, dtype, layer=whole), models.sides_of(DECODING), base))
    assert set(decoded) == set(models.SIDES)
    assert decoded[sides.FROZEN].shape == (1, cases.PROMPT + cases.DECODED)
    if dtype == "float32":
        assert all(torch.equal(it, decoded[sides.FROZEN]) for it in decoded.values())


def test_sides_share_the_models_weights_but_for_the_packed(tiny_model):
    shared = models._sharing(tiny_model)
    assert all(a is b for a, b in zip(shared.parameters(), tiny_model.parameters(), strict=True))
    assert all(a is not b for a, b in zip(shared.modules(), tiny_model.modules(), strict=True))


def test_plans_guess_more_for_more():
    plan = Plan([case()], rounds=5, budget=0.1)
    assert plan.seconds(case(rows=2048)) > plan.seconds(case(rows=1))
