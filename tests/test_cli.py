"""The command line: what it lists, what it counts, and how it says that something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_lora
from fused_lora import paths
from fused_lora.binary import BINARY
from fused_lora.cli import TARGET_SETS, main
from fused_lora.paths import PATHS
from tests import models

steady = pytest.fixture(models.steady, autouse=True)


def rows(text: str) -> dict[str, str]:
    """A listing's two columns."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines())


def save(directory: Path, family: str, **sizes) -> str:
    models.configure(family, **sizes).save_pretrained(directory)
    return str(directory)


def table(text: str) -> dict[str, tuple[int, int, float]]:
    """{targets: (linears, trained, share in per cent)}"""
    line = re.compile(r"(\S+) +(\d+) +([\d,]+) +([\d.]+) %")
    found = (line.fullmatch(row) for row in text.splitlines())
    return {m[1]: (int(m[2]), int(m[3].replace(",", "")), float(m[4])) for m in found if m}


# info


def test_info_lists_versions_the_machine_the_build_and_the_paths(capsys):
    assert main(["info"]) == 0
    listed = rows(capsys.readouterr().out)
    assert listed["fused-lora"] == fused_lora.__version__
    assert listed["python"] == ".".join(map(str, sys.version_info[:3]))
    assert listed["torch"].startswith(f"{torch.__version__}, CUDA ")
    assert listed["processor"].endswith(f"{torch.get_num_threads()} threads")
    for fact, value in BINARY.facts.items():
        assert listed[f"build: {fact}"] == value
    for path in set(PATHS) - {"auto"}:
        problem = paths.obstacle(path, "cpu")
        assert listed[f"path: {path} on cpu"] == (problem or "available")
        assert f"path: {path} on cuda" in listed
    for device in ("cpu", "cuda"):
        assert listed[f"a call on {device} takes"] == fused_lora.explain(device)


def test_info_says_why_a_gpu_is_not_used(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["info"])
    listed = rows(capsys.readouterr().out)
    assert listed["gpu"] == "none"
    assert listed["path: composed on cuda"] == "no GPU is available"


def test_info_names_the_problem_of_a_binary_that_does_not_load(capsys, monkeypatch):
    from fused_lora import cli
    from fused_lora.binary import Binary

    broken = Binary(None, {"torch": "1.0"}, "it was built for torch 1.0")
    monkeypatch.setattr(cli, "BINARY", broken)
    monkeypatch.setattr(paths, "BINARY", broken)
    assert main(["info"]) == 0
    listed = rows(capsys.readouterr().out)
    assert listed["build: torch"] == "1.0"
    assert listed["build: problem"] == "it was built for torch 1.0"
    assert listed["path: composed on cpu"] == "it was built for torch 1.0"
    assert listed["path: reference on cpu"] == "available"


# targets


@pytest.mark.parametrize("rank", [16, 4])
def test_targets_counts_linears_and_parameters_of_each_set(rank, tmp_path, capsys):
    directory = save(tmp_path, "llama", num_hidden_layers=3, num_key_value_heads=2, head_dim=8)
    arguments = ["targets", directory] + ([] if rank == 16 else ["--r", str(rank)])
    assert main(arguments) == 0
    text = capsys.readouterr().out
    # By hand: (in + out) for each linear of a layer; q and o are 32→32, k and v 32→16.
    sizes = {
        "qkv": [32 + 32, 32 + 16, 32 + 16],
        "o_proj": [32 + 32],
        "fc1": [32 + 64, 32 + 64],
        "fc2": [64 + 32],
    }
    weights = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3
    base = 3 * (weights + 2 * 32) + 2 * 64 * 32 + 32
    assert text.startswith(f"LlamaForCausalLM, {base:,} parameters, r={rank}\n")
    counted = table(text)
    assert tuple(counted) == TARGET_SETS
    for targets, (linears, trained, share) in counted.items():
        parts = [sizes[role] for role in (sizes if targets == "all" else targets.split("+"))]
        expected = 3 * rank * sum(sum(part) for part in parts)
        assert (linears, trained) == (3 * sum(len(part) for part in parts), expected), targets
        assert share == pytest.approx(100 * expected / (base + expected), abs=5e-4), targets


def test_targets_lists_the_models_linears(tmp_path, capsys):
    assert main(["targets", save(tmp_path, "gpt2", n_layer=2)]) == 0
    text = capsys.readouterr().out
    listed = text.split("the model's linears:\n")[1].splitlines()
    assert listed == [
        "  2 × transformer.h.*.attn.c_attn  32→96",
        "  2 × transformer.h.*.attn.c_proj  32→32",
        "  2 × transformer.h.*.mlp.c_fc  32→128",
        "  2 × transformer.h.*.mlp.c_proj  128→32",
        "  1 × lm_head  32→64",
    ]


def test_targets_says_what_a_set_cannot_reach(tmp_path, capsys):
    assert main(["targets", save(tmp_path, "mixtral")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^fc2 +– +targets: nothing that 'fc2' names can carry an adapter:$", text, re.MULTILINE)
    assert (
        "left as they are:\n"
        "  model.layers.0.mlp.experts.down_proj: experts held as one 3-D parameter (4×32×64), not as linears"
    ) in text
    assert table(text)["o_proj+fc2"][:2] == (1, 16 * (32 + 32))


def test_targets_reads_no_weights(tmp_path, capsys):
    """A model of 70 billion parameters, from its configuration alone."""
    directory = save(
        tmp_path,
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert main(["targets", directory]) == 0
    text = capsys.readouterr().out
    assert text.startswith("LlamaForCausalLM, 70,553,706,496 parameters, r=16\n")
    assert table(text)["o_proj"][:2] == (80, 80 * 16 * 2 * 8192)


def test_targets_builds_a_model_whose_architecture_is_not_named(tmp_path, capsys):
    models.configure("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    assert main(["targets", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("LlamaModel, ")


# What goes wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{", "config.json"),
        ('{"model_type": "no_such_model"}', "no_such_model"),
        ("{}", "config.json"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "config.json"),
    ],
    ids=["none", "not JSON", "unknown model", "no model", "wrong type", "wrong sizes"],
)
def test_a_directory_that_describes_no_model_is_an_error(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["targets", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("fused-lora: ")
    assert message in err


def test_a_directory_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["targets", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"fused-lora: {tmp_path / 'none'} holds no config.json\n"


def test_a_rank_that_makes_no_sense_is_an_error(tmp_path, capsys):
    assert main(["targets", save(tmp_path, "llama"), "--r", "0"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err == "fused-lora: r must be a whole number ≥ 1, got 0\n"


def test_without_transformers_targets_says_what_to_install(tmp_path, capsys, monkeypatch):
    directory = save(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["targets", directory]) == 1
    assert "pip install transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["no_such"], ["targets"], ["targets", ".", "--r", "many"]], ids=str
)
def test_a_wrong_call_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fused-lora")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{fused_lora.__version__}\n"


def test_python_m_runs_it():
    ran = subprocess.run(
        [sys.executable, "-m", "fused_lora", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ran.stdout == f"{fused_lora.__version__}\n"
