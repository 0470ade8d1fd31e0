"""Builds fused_lora._C against the torch that is installed. Everything static is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build front ends do not put the project on the path

from build_support import architectures, facts, jobs, toolkit  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "fused-lora is compiled against the torch that you run it with, and this build environment has "
        "none. Install torch first, then turn build isolation off:\n"
        "    pip install torch setuptools ninja\n"
        "    pip install --no-build-isolation .\n"
        f"(import torch: {error})"
    ) from error

CSRC = ROOT / "csrc"
HEADERS = ROOT / "build" / "include"


class Build(NamedTuple):
    decision: toolkit.Decision
    toolkit: toolkit.Toolkit | None
    facts: dict[str, str]
    printed: list[str]


def plan_build() -> Build:
    try:
        found = toolkit.find_toolkit(torch.version.cuda) if torch.version.cuda else None
        decision = toolkit.decide(torch.version.cuda, found, os.environ.get("FORCE_CUDA"))
        printed = [f"CUDA kernels {'on' if decision.cuda else 'off'}: {decision.reason}"]
        chosen = "none"
        if decision.cuda:
            assert found is not None
            chosen, origin = architectures.choose(
                os.environ.get("TORCH_CUDA_ARCH_LIST"),
                local_capabilities(),
                architectures.supported_by(found),
            )
            printed.append(f"compiled for {chosen} ({origin})")
            # torch's builder reads the list here, and fails where it is unset and no GPU is at hand.
            os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
    except toolkit.BuildError as error:
        raise SystemExit(f"fused-lora: {error}") from error
    described = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none",
        "toolkit": found.version if decision.cuda and found else "none",
        "architectures": chosen,
        "cuda": "yes" if decision.cuda else "no",
        "reason": decision.reason,
        "commit": facts.commit(ROOT),
    }
    return Build(decision, found, described, printed)


def local_capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def sources(cuda: bool) -> list[str]:
    """Everything under csrc/, without CUDA all but csrc/kernels/ and csrc/torch/cuda*."""
    found = (path.relative_to(ROOT) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu"))
    return sorted(str(path) for path in found if cuda or not needs_cuda(path))


def needs_cuda(path: Path) -> bool:
    layer, inner, *_ = path.relative_to("csrc").parts
    return layer == "kernels" or (layer == "torch" and inner.startswith("cuda")) or path.suffix == ".cu"


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder, with the decision printed and the facts written where the loader looks."""

    def run(self) -> None:
        os.environ["MAX_JOBS"] = str(jobs.max_jobs(BUILD.decision.cuda))
        for line in BUILD.printed:
            print(f"fused-lora: {line}")
        facts.write_header(BUILD.facts, HEADERS / "build_facts.h")
        super().run()
        binary = Path(self.get_ext_fullpath(self.extensions[0].name))
        facts.write_json(BUILD.facts, binary.parent)


def extension() -> Extension:
    cuda = BUILD.decision.cuda
    # -g0: Python's own flags ask for debug information, a third of the compile time.
    optimise = ["-O3", "-g0", "-fvisibility=hidden"]
    arguments = {
        "name": "fused_lora._C",
        "sources": sources(cuda),
        "include_dirs": [str(CSRC), str(HEADERS)],
        "define_macros": [("FUSED_LORA_CUDA", "1")] if cuda else [],
        # at::parallel_for runs serially, without a word, unless both halves of the build have OpenMP.
        # No -std: torch adds the standard that its headers need.
        "extra_compile_args": {"cxx": [*optimise, "-Wall", "-fopenmp"]},
        "extra_link_args": ["-fopenmp"],
    }
    if not cuda:
        return cpp_extension.CppExtension(**arguments)
    assert BUILD.toolkit is not None
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(BUILD.toolkit.root)
    # No flag here may contain the letters "arch": torch would then leave its own architectures out.
    threads = f"--threads={jobs.nvcc_threads(BUILD.facts['architectures'])}"
    arguments["extra_compile_args"]["nvcc"] = [
        *("-O3", threads, "-Xcompiler=-fvisibility=hidden"),
        # torch switches CUDA's own operators of the 16-bit types off, in favour of its own types.
        *(f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF2_OPERATORS", "HALF_CONVERSIONS")),
        "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
        # A third of the size; older toolkits do not know the option.
        *(["--compress-mode=size"] if BUILD.toolkit.at_least(12, 8) else []),
    ]
    made = cpp_extension.CUDAExtension(**arguments)
    runtime = toolkit.runtime_library(BUILD.toolkit.root)
    if runtime is not None and runtime.name != "libcudart.so":
        # Named by its path, and found by its name when it runs: torch has loaded it before.
        made.libraries.remove("cudart")
        made.extra_link_args.append(str(runtime))
    return made


BUILD = plan_build()

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
