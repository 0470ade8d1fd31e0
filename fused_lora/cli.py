"""The command line: python -m fused_lora, or fused-lora."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_lora import paths
from fused_lora._version import __version__
from fused_lora.binary import BINARY
from fused_lora.data_check import KINDS, Fields, Report, Tokens, check, read
from fused_lora.explanation import explain
from fused_lora.layer import LoRASettings
from fused_lora.swap import add_lora, remove_lora
from fused_lora.targets import ROLES, inventory

TARGET_SETS = (*ROLES, "o_proj+fc2", "qkv+o_proj", "fc1+fc2", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-lora", description="LoRA linears as one fused operation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, the build, the machine, and which paths are available")
    targets = commands.add_parser("targets", help="what each target set would swap and train in a model")
    targets.add_argument("model", type=Path, help="a directory with a transformers model's config.json")
    targets.add_argument("--r", type=int, default=16, help="rank of the adapters (default: 16)")
    data = commands.add_parser(
        "check-data",
        help="what is wrong with the examples to tune on",
        description="Checks JSON lines or CSV before a model is tuned on them. Exit status: 0, nothing is "
        "wrong; 1, something is; 2, it could not be checked.",
    )
    _check_data_arguments(data)
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "check-data":
            print(report := check_data(asked))
            return 1 if report.failed else 0
        print(info() if asked.command == "info" else describe_targets(asked.model, asked.r))
    except (ImportError, OSError, ValueError) as error:
        print(f"fused-lora: {error}", file=sys.stderr)
        return 2 if asked.command == "check-data" else 1
    return 0


def info() -> str:
    rows = [
        ("fused-lora", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        (
            "processor",
            f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads",
        ),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]
    rows += [(f"build: {key}", value) for key, value in BINARY.facts.items()]
    if BINARY.problem:
        rows.append(("build: problem", BINARY.problem))
    for device in ("cpu", "cuda"):
        for path in paths.PATHS[1:]:
            problem = paths.obstacle(path, device)
            if device == "cuda" and not torch.cuda.is_available():
                problem = "no GPU is available"
            rows.append((f"path: {path} on {device}", problem or "available"))
    rows += [(f"a call on {device} takes", explain(device)) for device in ("cpu", "cuda")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _check_data_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, help=text, **more)

    option("data", "JSON lines, or a table with a header if it ends in .csv or .tsv", type=Path)
    option("--held-out", 'a second file, not trained on (else rows whose field "split" says so)', type=Path)
    option("--prompt", "the fields that make the prompt, as name,attributes (else by the usual names)")
    option("--completion", "the field to be learnt")
    option("--model", "a transformers directory: its tokenizer and context measure lengths", type=Path)
    option("--max-length", "tokens of an example, if fewer than the model's context", type=int)
    option("--region", "how telephone numbers are written, as GB (else only those with + are found)")
    option("--public", "contact details that may stand; repeatable", action="append", default=[])
    option("--allow", "a kind of fault to tolerate; repeatable", action="append", default=[], choices=KINDS)


def check_data(asked: argparse.Namespace) -> Report:
    """What data_check finds in the files that the arguments name."""
    if (asked.prompt is None) != (asked.completion is None):
        raise ValueError("--prompt and --completion go together")
    if asked.max_length is not None and (asked.model is None or asked.max_length < 1):
        raise ValueError(
            f"--max-length {asked.max_length}: must be ≥ 1, and needs --model to count tokens by"
        )
    fields = Fields(tuple(asked.prompt.split(",")), asked.completion) if asked.prompt else None
    files = [read(asked.data, fields)]
    if asked.held_out is not None:
        files.append(read(asked.held_out, files[0].fields, held_out=True))
    print(f"{asked.data.name}: {files[0].fields}")
    return check(
        [row for file in files for row in file.rows],
        tokens=Tokens.of(asked.model, asked.max_length) if asked.model else None,
        region=asked.region,
        public=asked.public,
        allow=asked.allow,
        found=[finding for file in files for finding in file.found],
    )


def describe_targets(directory: Path, r: int) -> str:
    """A table of the target sets on the model that `directory` configures; no weights are read."""
    LoRASettings(r=r)  # what is wrong with r is not a matter of the targets
    model = _meta_model(directory)
    lines = [f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, r={r}"]
    lines.append(f"{'targets':<12}{'linears':>9}{'trained':>14}{'share':>10}")
    notes: dict[str, None] = {}
    for targets in TARGET_SETS:
        try:
            report = add_lora(model, targets, r=r)
        except ValueError as error:
            lines.append(f"{targets:<12}{'–':>9}  {str(error).splitlines()[0]}")
            continue
        remove_lora(model)
        lines.append(
            f"{targets:<12}{len(report.swapped):>9}{report.trained:>14,}{100 * report.trained_share:>9.3f} %"
        )
        notes.update(dict.fromkeys(f"  {skip.name}: {skip.reason}" for skip in report.skipped))
    if notes:
        lines += ["left as they are:", *notes]
    return "\n".join([*lines, "the model's linears:", inventory(model)])


def _meta_model(directory: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers does not import ({error}): pip install transformers") from error
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no config.json")
    try:
        config: Any = transformers.AutoConfig.from_pretrained(directory)
        names = config.architectures or []
        kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        with torch.device("meta"):
            model: nn.Module = kind(config) if kind else transformers.AutoModel.from_config(config)
    except Exception as error:  # of many kinds: whatever the file's values run into
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    return model
