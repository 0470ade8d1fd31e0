"""The study of target sets: its runs on a tiny model, its file, and what it says of made-up figures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.target_study.__main__ import main
from benchmarks.target_study.rows import Cost, Frozen, Pilot, Store, Tuned
from benchmarks.target_study.verdict import Quality, Statement, front, statements


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too tiny for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SECONDS = {"o_proj": 1.0, "fc2": 1.1, "o_proj+fc2": 1.2, "all": 2.0}


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"name: jar {n}", "completion": f"Jar {n} holds {n}."} for n in range(24)]
    path = tmp_path / "jars.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def command(tiny_model: Path, own_data: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model", str(tiny_model), "--dtype", "float32", "--jobs", "--data", str(own_data)),
        *("--targets", "o_proj", "o_proj+fc2", "all", "--seeds", "2", "--steps", "2", "--rounds", "2"),
        *("--lrs", "1e-3", "1e-2", "--r", "2", "--out", str(tmp_path / "study")),
    ]


def kinds(path: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()[1:]]


def test_the_study_measures_every_set_and_tells(command, tmp_path, capsys):
    assert main(command) == 0
    out = tmp_path / "study"
    found = kinds(out / "rows.jsonl")
    assert [found.count(kind) for kind in ("cost", "frozen", "pilot", "tuned")] == [3, 1, 6, 6]
    said = (out / "target_study.md").read_text()
    for claim in ("o_proj alone is the best trade", "o_proj+fc2 is the choice", "adapting everything"):
        assert claim in said
    assert "## What held" in said
    rows = list(csv.DictReader((out / "target_study.csv").open()))
    assert {(row["targets"], row["seed"]) for row in rows} == {
        (targets, seed) for targets in ("o_proj", "o_proj+fc2", "all") for seed in "01"
    }
    assert "(target_study.svg)" in said
    assert all(f">{name}<" in (out / "target_study.svg").read_text() for name in ("o_proj+fc2", "all"))


def test_a_study_that_stopped_goes_on_to_the_same_figures(command, tmp_path, capsys):
    main(command)
    rows = tmp_path / "study" / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines[1:]]
    rows.write_text("".join(lines[:-3]) + lines[-3][:20])  # stopped while it wrote
    assert main(command) == 0
    again = [json.loads(line) for line in rows.read_text().splitlines()[1:]]
    for one, other in zip(whole, again, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_study_that_is_done_runs_nothing_more(command, tmp_path, capsys):
    main(command)
    rows = tmp_path / "study" / "rows.jsonl"
    before = rows.read_bytes()
    assert main(command) == 0
    assert rows.read_bytes() == before


def test_other_settings_are_not_mixed_into_a_file(command, tmp_path, capsys):
    main([*command, "--seeds", "1"])
    before = (tmp_path / "study" / "rows.jsonl").read_bytes()
    assert main([*command, "--steps", "3"]) == 2
    assert "was made with seeds = 1, and this run has 2" in capsys.readouterr().err
    assert (tmp_path / "study" / "rows.jsonl").read_bytes() == before
    assert main([*command, "--steps", "3", "--seeds", "1", "--anew"]) == 0
    assert (tmp_path / "study" / "previous-rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "o_prj"], "o_prj"),
        (["--seeds", "0"], "got 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--data"], "name no job"),
    ],
)
def test_wrong_input_is_named(command, arguments, said, capsys):
    try:
        status = main([*command, *arguments])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_pilot_sees_nothing_that_is_held_out(command, own_data, tmp_path, capsys):
    """Other held-out answers change figures, and neither pilots nor the learning rate that they chose."""

    def study(out: str) -> list[dict[str, object]]:
        main([*command, "--seeds", "1", "--out", str(tmp_path / out)])
        return [json.loads(line) for line in (tmp_path / out / "rows.jsonl").read_text().splitlines()[1:]]

    first = study("first")
    lines = [json.loads(line) for line in own_data.read_text().splitlines()]
    for row in lines[5::6]:
        row["completion"] = "Something else."
    own_data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    second = study("second")
    assert [r for r in first if r["kind"] == "pilot"] == [r for r in second if r["kind"] == "pilot"]
    tuned = [[(r["targets"], r["lr"]) for r in rows if r["kind"] == "tuned"] for rows in (first, second)]
    assert tuned[0] == tuned[1]
    assert [r["loss"] for r in first if r["kind"] == "tuned"] != [
        r["loss"] for r in second if r["kind"] == "tuned"
    ]


# The file


@pytest.mark.parametrize(
    "row",
    [
        Frozen("copy", 3.0, {"AUC": 0.5}),
        Pilot("copy", "o_proj", 1e-3, 2.0),
        Tuned("copy", "o_proj", 1, 1e-3, 2.0, {"AUC": 0.7}, 12.0),
        Cost("o_proj", 100, {"ours": [1.0, 2.0]}, {"ours": 7}),
    ],
)
def test_a_row_comes_back_as_it_was(row, tmp_path):
    Store.open(tmp_path / "rows.jsonl", {"steps": 1}).add(row)
    assert Store.open(tmp_path / "rows.jsonl", {"steps": 1}).rows == [row]


@pytest.mark.parametrize("line", ["{}", "[]", "nothing", '{"kind": "tuned", "job": "copy"}'])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"steps": 1}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        Store.open(path, {"steps": 1})


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="does not say with what it was made"):
        Store.open(path, {})


# The claim


def of(quality: Quality, seconds: dict[str, float] | None = None) -> list[bool | None]:
    return [it.held for it in statements(quality, SECONDS if seconds is None else seconds)]


def around(mean: float) -> list[float]:
    return [mean - 0.01, mean, mean + 0.01]


def made_up(**means: float) -> Quality:
    return Quality(0.0, {name.replace("_and_", "+"): around(mean) for name, mean in means.items()})


def test_the_claim_holds_where_its_sets_are_the_best():
    assert of(made_up(o_proj=0.8, fc2=0.7, o_proj_and_fc2=1.0, all=1.0)) == [True, True, True]


def test_o_proj_is_no_best_trade_where_a_set_as_cheap_is_better():
    quality = made_up(o_proj=0.8, fc2=0.9, o_proj_and_fc2=1.0, all=1.0)
    assert of(quality)[0] is True  # fc2 is dearer
    assert of(quality, {**SECONDS, "fc2": 1.0})[0] is False


def test_a_set_that_costs_more_by_less_than_the_timings_vary_is_no_dearer():
    quality = made_up(o_proj=0.8, fc2=0.9, o_proj_and_fc2=1.0, all=1.0)
    trade = statements(quality, SECONDS, timing_noise=0.15)[0]
    assert trade.held is False
    assert trade.because == "No dearer by more than 15%, and better by more than noise: fc2."


def test_o_proj_is_no_best_trade_where_it_gains_nothing():
    assert of(made_up(o_proj=0.0, fc2=0.5, o_proj_and_fc2=0.5, all=0.5))[0] is False


def test_a_better_set_than_o_proj_and_fc2_is_named():
    claims = statements(made_up(o_proj=0.5, o_proj_and_fc2=0.6, all=0.9), SECONDS)
    assert [it.held for it in claims[1:]] == [False, False]
    assert "all" in claims[1].because
    assert "0.3" in claims[2].because


def test_a_difference_within_the_noise_decides_nothing_against_the_claim():
    assert of(made_up(o_proj=0.8, o_proj_and_fc2=0.990, all=1.0))[1:] == [True, True]


def test_where_no_set_gains_nothing_is_said():
    assert of(made_up(o_proj=0.0, fc2=-0.3, o_proj_and_fc2=0.01, all=0.0)) == [None, None, None]


def test_one_seed_says_nothing():
    quality = Quality(0.0, {name: [1.0] for name in SECONDS})
    assert math.isinf(quality.noise)
    assert of(quality) == [None, None, None]


def test_without_a_cost_nothing_is_said_of_the_trade():
    assert of(made_up(o_proj=0.8, o_proj_and_fc2=1.0, all=1.0), {}) == [None, True, True]


def test_the_noise_is_what_chance_exceeds_once_in_twenty():
    """Two sets without a difference, many times over."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 8, 3, generator=generator, dtype=torch.float64).tolist()
    apart = 0
    for runs in draws:
        quality = Quality(0.0, {str(index): values for index, values in enumerate(runs)})
        apart += abs(quality.mean("0") - quality.mean("1")) > quality.noise
    assert 0.04 < apart / len(draws) < 0.06


def test_gains_are_shares_of_the_best_sets():
    quality = Quality(1.0, {"o_proj": [1.5, 1.5], "all": [2.0, 2.0]})
    assert quality.best == "all"
    assert quality.gain("o_proj") == 0.5


def test_a_statement_says_whether_it_held():
    assert str(Statement("It is so", True, "Seen.")) == "It is so: **held**. Seen."
    assert "did not hold" in str(Statement("It is so", False, ""))
    assert "cannot be said" in str(Statement("It is so", None, ""))


def test_the_front_is_what_nothing_beats():
    points = {"cheap": (1.0, 1.0), "worse": (2.0, 0.5), "dear": (3.0, 2.0), "same": (3.0, 1.5)}
    assert front(points) == ["cheap", "dear"]
    assert front({}) == []
