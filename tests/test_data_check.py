"""What `fused-lora check-data` finds in examples, what it leaves alone, and what it cannot read."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.product_copy import data
from examples.shop.jobs import JOBS
from fused_lora.cli import main
from fused_lora.data_check import KINDS, DataError, Row, Tokens, check, read

CLEAN = [
    {
        "prompt": example.prompt,
        "completion": example.completion,
        "split": "heldout" if example.heldout else "train",
    }
    for example in data.read(data.CATALOGUE)[:50]
]
AT = 7  # the row that a test spoils, on line 8; it is trained on, and CLEAN[5] is held out


@pytest.fixture
def checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Checks rows, or lines as they are, and gives the exit status and what was said."""

    def run(rows: list[Any], *options: str) -> tuple[int, str]:
        path = tmp_path / "shop.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        code = main(["check-data", str(path), *options])
        return code, "".join(capsys.readouterr())

    return run


def spoilt(**changes: Any) -> list[Any]:
    return [*CLEAN[:AT], {**CLEAN[AT], **changes}, *CLEAN[AT + 1 :]]


def after(row: dict[str, Any]) -> list[Any]:
    return [*CLEAN, row]


TEXT, ASKED = CLEAN[AT]["completion"], CLEAN[AT]["prompt"]
UNSEEN = {**CLEAN[AT], "split": "heldout"}
FAULTS: dict[str, tuple[str, list[Any], str]] = {
    "a field is missing": (
        "schema",
        [*CLEAN[:AT], {"prompt": "a", "split": "train"}, *CLEAN[AT:]],
        "8: lacks 'completion'",
    ),
    "a number": ("schema", spoilt(completion=5), "8: 'completion' is not text but a number"),
    "a list among texts": (
        "schema",
        spoilt(prompt=["a"]),
        "8: 'prompt' is a list, where the first row has text",
    ),
    "no object": ("schema", [*CLEAN[:AT], "[1]", *CLEAN[AT:]], "8: not an object but a list"),
    "not JSON": ("schema", [*CLEAN[:AT], '{"prompt": ', *CLEAN[AT:]], "8: not JSON"),
    "no such split": ("schema", spoilt(split="treino"), "8: 'split' is none of train"),
    "nothing": ("empty", spoilt(completion=""), "8: the completion says nothing"),
    "spaces": ("empty", spoilt(prompt=" \n"), "8: the prompt says nothing"),
    "null": ("empty", spoilt(completion=None), "8: the completion says nothing"),
    "a word for nothing": ("empty", spoilt(completion="N/A"), "8: the completion says nothing: “N/A”"),
    "no end": ("truncated", spoilt(completion=TEXT[:-12]), "8: the completion stops in mid-sentence"),
    "decoded as another": (
        "encoding",
        spoilt(completion="Café. ".encode().decode("cp1252") + TEXT),
        "8: the completion holds text decoded wrongly; it, and what it was: “CafÃ©.",
    ),
    "a lost letter": (
        "encoding",
        spoilt(prompt=ASKED + " caf\ufffd"),
        "8: the prompt holds a replacement character",
    ),
    "a control character": (
        "encoding",
        spoilt(prompt=ASKED + "\x00 a"),
        "8: the prompt holds a control character",
    ),
    "half a pair": ("encoding", spoilt(prompt=ASKED + " \ud83d"), "8: the prompt holds half of a character"),
    "HTML": (
        "encoding",
        spoilt(prompt=ASKED + " Tern &amp; Tallow"),
        "8: the prompt holds the HTML entity &amp;",
    ),
    "an escape": ("encoding", spoilt(prompt=ASKED + r" caf\u00e9"), "8: the prompt holds an escape"),
    "the same again": (
        "duplicate",
        after({**CLEAN[AT], "prompt": ASKED.upper() + "  "}),
        "line 51: the same as shop.jsonl, line 8",
    ),
    "nearly the same": (
        "near-duplicate",
        after({**CLEAN[AT], "prompt": ASKED + "\nsize: new", "completion": TEXT.replace("the", "a", 1)}),
        "the same as shop.jsonl, line 8",
    ),
    "another answer": (
        "contradiction",
        after({**CLEAN[AT], "completion": CLEAN[AT + 1]["completion"][::-1] + "."}),
        "line 51: another answer than shop.jsonl, line 8",
    ),
    "held out and trained on": (
        "leakage",
        after({**UNSEEN, "completion": "Something else altogether."}),
        "line 51: its prompt is that of shop.jsonl, line 8",
    ),
    "held out and nearly trained on": (
        "leakage",
        after({**UNSEEN, "prompt": ASKED + "\nnew", "completion": "Something else altogether."}),
        "the same as in shop.jsonl, line 8",
    ),
    "an address": (
        "personal",
        spoilt(completion=f"Ask jane.doe@mail.example.org. {TEXT}"),
        "8: the completion holds an e-mail address: “Ask j•••.•••@••••.•••••••.•••",
    ),
    "a telephone number": (
        "personal",
        spoilt(prompt=ASKED + " Tel. +44 20 7946 0958"),
        "8: the prompt holds a telephone number",
    ),
    "a card": (
        "personal",
        spoilt(prompt=ASKED + " 4111 1111 1111 1111"),
        "8: the prompt holds a card number",
    ),
    "an account": (
        "personal",
        spoilt(prompt=ASKED + " GB82 WEST 1234 5698 7654 32 NOW"),
        "8: the prompt holds an account number (IBAN)",
    ),
}


def faulty(text: str) -> list[str]:
    return [kind for kind in KINDS if f"FAULT {kind} " in text]


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_no_other(checked: Callable[..., tuple[int, str]], name: str) -> None:
    kind, rows, said = FAULTS[name]
    code, text = checked(rows)
    assert code == 1
    assert faulty(text) == [kind], text
    assert said.replace("8: ", "shop.jsonl, line 8: ", 1) in text


def test_clean_data_passes(checked: Callable[..., tuple[int, str]]) -> None:
    code, text = checked(CLEAN)
    assert code == 0
    assert faulty(text) == []
    assert "shop.jsonl: prompt: prompt; completion: completion" in text
    assert "42 rows to train on, 8 held out" in text
    assert "too-long        not checked: no model was given" in text


@pytest.mark.parametrize("name", JOBS)
def test_the_shops_own_data_is_clean(name: str) -> None:
    rows = [Row(e.title, e.prompt, e.completion, e.heldout) for e in JOBS[name].examples()]
    assert str(check(rows, region="GB")).count("  ok ") == len(KINDS) - 1


def test_what_is_allowed_is_shown_and_does_not_fail(checked: Callable[..., tuple[int, str]]) -> None:
    rows = after(CLEAN[AT])
    assert checked(rows)[0] == 1
    code, text = checked(rows, "--allow", "duplicate")
    assert code == 0
    assert "note  duplicate" in text
    assert "line 51" in text


def test_personal_data_is_nowhere_in_the_report(checked: Callable[..., tuple[int, str]]) -> None:
    """Not where it is found, nor where it stands beside another fault, nor in half at an excerpt's edge."""
    secrets = "jane.doe@mail.example.org", "+44 20 7946 0958", "4111 1111 1111 1111"
    for pad in range(0, 60, 7):
        rows = after({**CLEAN[AT], "completion": f"{'x' * pad} {' '.join(secrets)} \ufffd"})
        text = checked(rows)[1]
        assert {"encoding", "contradiction", "personal"} <= {*faulty(text)}
        for part in ("doe", "example.org", "7946", "0958", "1111"):
            assert part not in text, (pad, text)


def test_a_country_s_own_telephone_numbers_need_its_name(checked: Callable[..., tuple[int, str]]) -> None:
    rows = spoilt(prompt=ASKED + " Tel. 020 7946 0958")
    assert checked(rows)[0] == 0
    assert faulty(checked(rows, "--region", "GB")[1]) == ["personal"]
    code, text = checked(rows, "--region", "Britain")
    assert code == 2
    assert "'Britain'" in text


def test_numbers_that_are_no_persons_are_left_alone(checked: Callable[..., tuple[int, str]]) -> None:
    numbers = (
        "order 4111 1111 1111 1112, 0.00498630224875285, 2026-11-24 10:15:00, VAT 412 7730 97, 4006381333931"
    )
    assert checked(spoilt(prompt=f"{ASKED} {numbers}"), "--region", "GB")[0] == 0


def test_public_details_may_stand(checked: Callable[..., tuple[int, str]]) -> None:
    rows = spoilt(prompt=ASKED + " Write to Shop@tern.example.org or +44 20 7946 0958")
    public = "--public", "shop@tern.example.org"
    assert checked(rows, *public)[0] == 1
    assert checked(rows, *public, "--public", "+442079460958")[0] == 0


def test_lengths_are_held_against_the_context(
    checked: Callable[..., tuple[int, str]], tiny_model: Path
) -> None:
    rows = spoilt(completion=" ".join(row["completion"] for row in CLEAN[:AT]))
    model = "--model", str(tiny_model)
    code, text = checked(rows, *model)
    assert code == 1
    assert faulty(text) == ["too-long"]
    assert "line 8" in text
    assert "512 are read" in text
    assert checked(CLEAN, *model)[0] == 0
    assert faulty(checked(spoilt(prompt=ASKED + " \ud83d"), *model)[1]) == ["encoding"]
    assert faulty(checked(CLEAN, *model, "--max-length", "40")[1]) == ["too-long"]
    assert "reads 512 tokens at most" in checked(CLEAN, *model, "--max-length", "1000")[1]


def test_exactly_the_context_is_not_too_long() -> None:
    rows = [Row("a", "x" * 200, "y"), Row("b", "x" * 201, "z")]
    tokens = Tokens(lambda prompt, completion: len(prompt), 200)
    assert [
        finding.place for finding in check(rows, tokens=tokens).findings if finding.kind == "too-long"
    ] == ["b"]


def test_a_column_that_was_too_narrow_shows() -> None:
    rows = [Row(f"line {n}", f"prompt {n}", f"{n} " + "word " * (n + 20)) for n in range(40)]
    cut = [Row(row.place, row.prompt, row.completion[:200]) for row in rows]
    found = [finding for finding in check(cut, allow=KINDS).findings if finding.kind == "truncated"]
    assert {finding.place for finding in found} == {f"line {n}" for n in range(20, 40)}
    assert "cut at 200 characters" in found[0].what


def test_json_that_lost_its_end_shows() -> None:
    rows = [Row(str(n), f"prompt {n}", json.dumps({"number": n, "of": "many"})) for n in range(30)]
    rows[4] = Row("4", "prompt 4", '{"number": 4, "of')
    assert [finding.place for finding in check(rows).findings if finding.kind == "truncated"] == ["4"]


def test_what_most_rows_share_makes_none_of_them_alike() -> None:
    long = "Read the following document with care and answer with nothing but its total in pounds. " * 3
    rows = [Row(str(n), f"{long} Total: {n * 37} pounds", f"{n * 37}") for n in range(60)]
    assert not check(rows).findings


def test_rows_are_alike_without_spaces_too() -> None:
    said = "この鍋は琺瑯で出来ていて一リットルの牛乳が入ります。柄は橅なので熱くなりません。"
    rows = [
        Row("a", said, "はい。"),
        Row("b", said.replace("牛乳", "豆乳"), "はい。"),
        Row("c", "小さな包丁です。", "いいえ。"),
    ]
    assert [(found.kind, found.place) for found in check(rows).findings] == [("near-duplicate", "b")]


# What is read


def test_a_table_is_read_as_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Delimiters, quotes and line ends within cells included."""
    rows = [{**row, "prompt": row["prompt"] + '\n"quoted", with; marks'} for row in CLEAN]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    expected = [(row.prompt, row.completion, row.held_out) for row in read(lines).rows]
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")):
        path = tmp_path / name
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert [(row.prompt, row.completion, row.held_out) for row in read(path).rows] == expected


def test_a_tables_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"a\nb",c\n\nd,e,f\ng,h\n', encoding="utf-8")
    file = read(path)
    assert [(row.place, row.prompt) for row in file.rows] == [
        ("rows.csv, line 2", "a\nb"),
        ("rows.csv, line 6", "g"),
    ]
    assert [(found.place, found.what) for found in file.found] == [
        ("rows.csv, line 5", "3 cells under 2 names")
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction: Add.\ninput: 1 2", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "instruction: Add.", "3"),
        ({"question": "q", "answer": "a", "id": 4}, "q", "a"),
        ({"text": "only this"}, "", "only this"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "user: q",
            "a",
        ),
    ],
)
def test_usual_shapes_are_recognised(
    tmp_path: Path, row: dict[str, Any], prompt: str, completion: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read(path).rows == [Row("rows.jsonl, line 1", prompt, completion)]


def test_fields_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--prompt", "name,category,attributes", "--completion", "copy"
    assert main(["check-data", str(data.CATALOGUE), *options]) == 0
    assert "175 rows to train on, 35 held out" in capsys.readouterr().out
    assert main(["check-data", str(data.CATALOGUE), "--prompt", "name"]) == 2


def test_held_out_rows_may_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("train.jsonl", CLEAN[:20]), ("unseen.jsonl", [*CLEAN[20:25], CLEAN[3]])):
        text = "\n".join(json.dumps({**row, "split": "train"}) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "unseen.jsonl")
    assert main(["check-data", *files]) == 1
    text = capsys.readouterr().out
    assert "20 rows to train on, 6 held out" in text
    assert "unseen.jsonl, line 6: its prompt is that of train.jsonl, line 4" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.jsonl", None, "there is no such file"),
        ("empty.jsonl", b"", "holds no rows"),
        ("empty.csv", b"prompt,completion\n", "holds no rows"),
        ("prose.jsonl", b"Dear both,\nthank you\n", "line 1: not JSON"),
        ("array.json", b'[{"prompt": "a", "completion": "b"}]', "is one JSON array"),
        ("spread.json", b'[\n{"prompt": "a"}\n]', "is one JSON document"),
        ("fields.jsonl", b'{"titre": "a", "texte": "b"}\n', "its fields are 'titre', 'texte'"),
        ("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (
            "latin.csv",
            "prompt,completion\na,b\ncafé,d\n".encode("latin-1"),
            "line 3: is not UTF-8 (byte 0xe9)",
        ),
        ("open.csv", b'prompt,completion\n"a,b\nc,d\n', "the row that begins on line 2 is not CSV"),
        ("twice.csv", b"prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["check-data", str(path)]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert said in error


def test_a_folder_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_what_it_stands_on_is_asked_for(
    checked: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_lora.data_check.find_spec", lambda name: None if name == "ftfy" else name)
    code, text = checked(CLEAN)
    assert code == 2
    assert "ftfy not installed: pip install 'fused-lora[data]'" in text


def test_wrong_arguments_are_said() -> None:
    with pytest.raises(DataError, match="allow: typo is no kind of fault"):
        check([Row("a", "b", "c")], allow=["typo"])
    with pytest.raises(DataError, match="no examples"):
        check([])


def test_fifty_thousand_rows_take_seconds() -> None:
    """Half of them are so alike that a comparison of all with all would never end."""
    alike = "said for years what nobody else in town says"
    rows = [
        Row(
            str(n),
            f"{alike} {n * n} {n}" if n % 2 else f"{n} {n * 7} {n * n} {n % 13} {n % 101}",
            f"{n} it is",
        )
        for n in range(50_000)
    ]
    rows.append(Row("last", rows[10].prompt, rows[10].completion))
    began = time.process_time()
    report = check(rows, allow=("near-duplicate",))
    assert [finding.place for finding in report.failed] == ["last"]
    assert time.process_time() - began < 100
