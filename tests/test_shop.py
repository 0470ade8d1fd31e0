"""The shop's four jobs: their data, their figures on planted answers, and a run from tuning to serving."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from examples.product_copy import model as models
from examples.product_copy.data import Example
from examples.product_copy.errors import DemoError
from examples.shop import customers, documents, support, tuning
from examples.shop.__main__ import main
from examples.shop.jobs import JOBS
from examples.shop.language_model import LanguageModel
from examples.shop.run import demand_sound
from examples.shop.serving import Shop
from examples.shop.tuning import Settings

# The data


def test_every_ticket_states_its_policy_and_no_other() -> None:
    """So that the share of answers that state the fact is of those and not of chance matches."""
    rules, tickets = support.policies(), support.tickets()
    assert len(tickets) >= 140
    for policy in rules.values():
        assert policy.stated_in(policy.fact), policy.id
    for ticket in tickets:
        stated = [policy.id for policy in rules.values() if policy.stated_in(ticket.answer)]
        assert stated == [ticket.policy], ticket.id
        assert ticket.answer.endswith("Tern & Tallow"), ticket.id


def test_every_policy_is_taught_and_asked_for() -> None:
    for policy in support.policies():
        held_out = [ticket.heldout for ticket in support.tickets() if ticket.policy == policy]
        assert sum(held_out) == 1
        assert len(held_out) - sum(held_out) >= 3


@pytest.mark.parametrize("name", JOBS)
def test_enough_is_held_out(name: str) -> None:
    held_out = [example.heldout for example in JOBS[name].examples()]
    assert sum(held_out) >= 30
    assert len(held_out) - sum(held_out) >= 2 * sum(held_out)


@pytest.mark.parametrize("make", [documents.examples, customers.customers])
def test_generated_data_depend_on_the_seed_alone(make) -> None:
    assert make(0) == make(0)
    assert make(0)[0] != make(1)[0]


def test_a_document_holds_every_number_of_its_truth() -> None:
    for example in documents.examples()[:100]:
        truth = json.loads(example.completion)
        text = example.prompt.replace(",", "")
        assert truth["number"] in text
        assert truth["supplier"].lower() in text.lower()
        for item in truth["items"]:
            assert item["code"] in text
            assert re.search(rf"\b{item['quantity']}\b", text)
        assert sum(item["quantity"] * item["price"] for item in truth["items"]) == pytest.approx(
            truth["total"]
        )


# The figures


def test_a_documents_score_counts_what_is_exact() -> None:
    asked = documents.examples()[0]
    truth = json.loads(asked.completion)
    fields = 4 + len(truth["items"])
    answers = [
        asked.completion,
        json.dumps({**truth, "total": -1}),
        json.dumps({**truth, "remark": "one field too many"}),
        "no JSON",
        "[]",
        asked.completion[:-4],
    ]
    assert documents.score(answers, [asked] * 6) == {
        "valid JSON": 3 / 6,
        "exact fields": (3 * fields - 1) / (6 * fields),
        "exact documents": 1 / 6,
    }


def test_an_answer_must_state_all_of_a_fact() -> None:
    tickets = zip(support.examples(), support.tickets(), strict=True)
    postage = [example for example, ticket in tickets if ticket.policy == "postage"][:2]
    answers = ["It costs £4.50, or nothing from £60.", "It costs £4.50."]
    assert support.score(answers, postage) == {"answers that state the fact": 0.5}


def test_who_leaves_can_be_told_and_not_perfectly() -> None:
    figures = customers.reference_figures()
    best = figures["AUC of the process without its noise"]
    assert 0.7 < figures["AUC of a logistic regression"] <= best + 0.02 < 0.95
    left = [person.left for person in customers.customers()[customers.TRAIN :]]
    assert 0.3 < sum(left) / len(left) < 0.7
    assert customers.auc([True, False], [1.0, 0.0]) == 1
    assert customers.auc([True, False], [0.0, 1.0]) == 0
    with pytest.raises(DemoError, match="all ended alike"):
        customers.auc([True, True], [0.0, 1.0])


def test_data_with_a_fault_is_not_tuned_on(tiny_model: Path) -> None:
    language = LanguageModel.load(tiny_model)
    examples = support.examples()
    demand_sound(examples, language)
    trained = next(example for example in examples if not example.heldout)
    leak = replace(trained, heldout=True)
    with pytest.raises(DemoError, match=r"not fit to tune on(.|\n)*FAULT leakage"):
        demand_sound([*examples, leak], language)


# The model


def test_answers_come_in_the_order_of_their_questions(tiny_model: Path) -> None:
    """They are computed by length, in batches with padding."""
    language = LanguageModel.load(tiny_model)
    asked = [Example("", "jar " * count, "", True, 1) for count in (9, 2, 30, *range(20, 3, -1))]
    one_by_one = [language.write([example], 6)[0] for example in asked]
    assert len(set(one_by_one)) > 3
    assert language.write(asked, 6) == one_by_one
    preferences = [language.preference([example], "yes", "no")[0] for example in asked]
    assert language.preference(asked, "yes", "no") == pytest.approx(preferences, abs=1e-4)
    opposite = [-value for value in preferences]
    assert language.preference(asked, "no", "yes") == pytest.approx(opposite, abs=1e-4)


# A run


def run(job: str, model: Path, out: Path, *more: str) -> int:
    settings = ["--steps", "8", "--batch-size", "4", "--r", "4", "--lr", "0.02", "--heldout", "6"]
    return main([job, "--model", str(model), "--out", str(out), *settings, *more])


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shop")
    for job in JOBS:
        assert run(job, tiny_model, out) == 0
    return out


@pytest.mark.parametrize(
    ("job", "figures"),
    [
        ("copy", set()),
        ("support", {"answers that state the fact"}),
        ("documents", {"valid JSON", "exact fields", "exact documents"}),
        ("churn", {"AUC"}),
    ],
)
def test_what_a_job_leaves_behind(tuned: Path, job: str, figures: set[str]) -> None:
    outcome = json.loads((tuned / job / "outcome.json").read_text(encoding="utf-8"))
    assert outcome["loss_after"] < outcome["loss_before"]
    assert outcome["before"].keys() == outcome["after"].keys() == figures
    assert all(0 <= value <= 1 for value in [*outcome["before"].values(), *outcome["after"].values()])
    beside = {"AUC of a logistic regression", "AUC of the process without its noise"}
    assert outcome["beside"].keys() == (beside if job == "churn" else set())
    assert outcome["heldout"] == 6
    report = (tuned / job / "report.md").read_text(encoding="utf-8")
    assert all(figure in report for figure in {*figures, *outcome["beside"], "tiny-llama"})
    assert report.count("**After:**") == 3
    assert {path.name for path in (tuned / job).iterdir()} == {
        *("adapter", "outcome.json", "report.md", "settings.json")
    }


def test_stock_peft_loads_the_adapter_as_it_was(tuned: Path, tiny_model: Path) -> None:
    """The loss that the job measured is what PEFT alone gets with the file."""
    outcome = json.loads((tuned / "support" / "outcome.json").read_text(encoding="utf-8"))
    language = LanguageModel.load(tiny_model)
    unseen = [example for example in support.examples() if example.heldout][:6]
    assert language.loss(unseen) == pytest.approx(outcome["loss_before"], abs=1e-5)
    language.model = peft.PeftModel.from_pretrained(language.model, tuned / "support" / "adapter")
    assert language.loss(unseen) == pytest.approx(outcome["loss_after"], abs=1e-5)


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends a run as a power cut would, a step after its checkpoint."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == tuning.SAVE_EVERY + 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_one_that_was_not(tiny_model: Path, tmp_path: Path) -> None:
    settings = Settings("tiny", tuning.SAVE_EVERY + 4, 2, ("o_proj",), r=4, alpha=8.0, lr=0.05, seed=0)

    def tune(name: str, settings: Settings = settings, callbacks: Sequence[Stop] = ()) -> dict[str, Any]:
        language = LanguageModel.load(tiny_model)
        train = language.encode([example for example in support.examples() if not example.heldout])
        (tmp_path / name).mkdir(exist_ok=True)
        tuning.tune(language, train, tmp_path / name, settings, callbacks)
        return peft.get_peft_model_state_dict(language.model)

    expected = tune("whole")
    with pytest.raises(KeyboardInterrupt):
        tune("cut", callbacks=[Stop()])
    with pytest.raises(DemoError, match=r"lr 0.05, not 0.1\. Ask for the same"):
        tune("cut", replace(settings, lr=0.1))
    resumed = tune("cut")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    again = tune("cut")  # as after a stop while it was measured
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_targets_that_are_not_there_are_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("support", tiny_model, tmp_path, "--targets", "o_porj") == 2
    assert "--targets o_porj" in capsys.readouterr().err


# Serving

QUESTION = "Sharpening\nDo you sharpen knives?"


def test_one_model_serves_every_job_with_its_own_adapter(tuned: Path, tiny_model: Path) -> None:
    """In turns, and each as the model with that adapter alone would."""
    shop = Shop.load(tiny_model, tuned)
    assert shop.jobs == tuple(JOBS)
    expected = {}
    for job in JOBS:
        model = peft.PeftModel.from_pretrained(models.load_model(tiny_model), tuned / job / "adapter")
        alone = LanguageModel(model, shop.language.tokenizer, tiny_model)
        asked = Example(job, JOBS[job].prompt(QUESTION), "", True, 1)
        (expected[job],) = alone.write([asked], JOBS[job].longest)
    in_a_line = QUESTION.replace("\n", "\\n")
    for _ in range(2):
        assert {job: shop.answer(f"{job}: {in_a_line}") for job in JOBS} == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize(
    "request_line",
    ["prices: a pan", "hello", "support:", ":", "support: Do you sharpen knives?", f"churn: {'jar ' * 600}"],
)
def test_a_wrong_request_is_told_so_and_ends_nothing(
    tuned: Path, tiny_model: Path, request_line: str
) -> None:
    shop = Shop.load(tiny_model, tuned)
    assert shop.answer(request_line).startswith("? ")
    assert not shop.answer("churn: No order this year.").startswith("? ")


def test_requests_come_by_lines(
    tuned: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["support: Sharpening\\nDo you sharpen knives?\n", "\n", "churn: March: read the letter.\n"]
    monkeypatch.setattr("sys.stdin", lines)
    assert main(["serve", "--model", str(tiny_model), "--out", str(tuned)]) == 0
    ready, *answers = capsys.readouterr().out.splitlines()
    assert ready.startswith("For copy, support, documents, churn.")
    assert len(answers) == 2


def test_serving_nothing_says_what_to_do(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(tiny_model), "--out", str(tmp_path)]) == 2
    assert "no job was tuned there yet" in capsys.readouterr().err
