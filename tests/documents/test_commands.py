"""Commands that the documents show are there, and the real parsers take their options."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys

import pytest

import fused_lora
from tests.documents.markdown import CONTRIBUTING, DOCUMENTS, EMULATOR, ROOT, Document

MAKEFILE = (ROOT / "Makefile").read_text()


class Parsed(Exception):
    """A program took its arguments; what it would do with them is not wanted here."""


@pytest.fixture
def run(monkeypatch):
    """Runs a module as python -m does, until its parser has taken the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, arguments=None, namespace=None):
        parse(self, arguments, namespace)
        raise Parsed

    def run(module: str, arguments: list[str]) -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")

    return run


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING, EMULATOR], ids=lambda d: d.name)
def test_every_command_is_taken(document: Document, run, capsys):
    for command in document.commands:
        words = shlex.split(command, comments=True)
        while "=" in words[0]:  # the environment
            words = words[1:]
        program, *arguments = words
        check = {"make": _check_make, "python": _check_python, "fused-lora": _check_ours}.get(program)
        if check is not None:
            check(run, arguments)


def _check_make(run, arguments: list[str]) -> None:
    variables = dict(word.split("=", 1) for word in arguments if "=" in word)
    for name in variables:
        assert re.search(rf"^{name} \?=|\$\({name}\)", MAKEFILE, re.MULTILINE), (
            f"the Makefile knows no {name}"
        )
    for target in (word for word in arguments if "=" not in word):
        rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
        assert rule is not None, f"the Makefile has no {target}"
        for module in re.findall(r"python -m (\S+)(?: .*)? \$\(ARGS\)", rule[1]):
            if _is_ours(module):
                run(module, shlex.split(variables.get("ARGS", "")))


def _check_python(run, arguments: list[str]) -> None:
    option, what, *rest = arguments
    if option == "-c":
        exec(what, {})
    elif option == "-m" and _is_ours(what):
        run(what, rest)


def _check_ours(run, arguments: list[str]) -> None:
    run("fused_lora", arguments)


def _is_ours(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_name_of_ours_is_there(document: Document):
    for path in re.findall(r"`fused_lora\.([\w.]+)", document.text):
        of = fused_lora
        for name in path.rstrip(".").split("."):
            of = getattr(of, name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_variable_is_read_somewhere(document: Document):
    sources = [
        path
        for folder in ("fused_lora", "build_support", "tests/gpu")
        for path in (ROOT / folder).glob("*.py")
    ]
    read = " ".join(path.read_text() for path in (*sources, ROOT / "setup.py"))
    for variable in set(re.findall(r"\b(?:FUSED_LORA|FORCE|TORCH_CUDA|MAX)_[A-Z_]+", document.text)):
        assert f'"{variable}"' in read, variable
