"""Builds fused_lora._C against the torch that is installed. Everything static is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build front ends do not put the project on the path

from build_support import facts, jobs, toolkit  # noqa: E402

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

# Where no GPU is at hand to ask: what the kernels are written for, and PTX for what comes after.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def describe_build() -> tuple[toolkit.Decision, toolkit.Toolkit | None, dict[str, str]]:
    try:
        found = toolkit.find_toolkit() if torch.version.cuda else None
        decision = toolkit.decide(torch.version.cuda, found, os.environ.get("FORCE_CUDA"), sources("**/*.cu"))
    except toolkit.BuildError as error:
        raise SystemExit(f"fused-lora: {error}") from error
    if decision.cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or "of the local GPU"
    described = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none",
        "toolkit": found.version if decision.cuda and found else "none",
        "architectures": architectures if decision.cuda else "none",
        "cuda": "yes" if decision.cuda else "no",
        "reason": decision.reason,
        "commit": facts.commit(ROOT),
    }
    return decision, found, described


class BuildExtension(cpp_extension.BuildExtension):
    """torch's builder, with the decision printed and the facts written where the loader looks."""

    def run(self) -> None:
        decision, _, described = BUILD
        os.environ["MAX_JOBS"] = str(jobs.max_jobs(decision.cuda))
        print(f"fused-lora: CUDA kernels {'on' if decision.cuda else 'off'}: {decision.reason}")
        facts.write_header(described, HEADERS / "build_facts.h")
        super().run()
        binary = Path(self.get_ext_fullpath(self.extensions[0].name))
        facts.write_json(described, binary.parent)


def extension() -> object:
    decision, found, _ = BUILD
    # -g0: Python's own flags ask for debug information, a third of the compile time.
    optimise = ["-O3", "-g0", "-fvisibility=hidden"]
    # at::parallel_for runs serially, without a word, unless both halves of the build have OpenMP.
    # No -std: torch adds the standard that its headers need.
    flags = {"cxx": [*optimise, "-Wall", "-fopenmp"]}
    if decision.cuda:
        assert found is not None
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(found.root)
        flags["nvcc"] = ["-O3", "--threads=2"]
    make = cpp_extension.CUDAExtension if decision.cuda else cpp_extension.CppExtension
    return make(
        name="fused_lora._C",
        sources=sources("**/*.cpp") + (sources("**/*.cu") if decision.cuda else []),
        include_dirs=[str(ROOT / "csrc"), str(HEADERS)],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


BUILD = describe_build()
HEADERS = ROOT / "build" / "include"

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
