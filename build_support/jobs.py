"""How many compilers to run at once."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Peak memory of one compiler: torch's headers in C++, and nvcc over several architectures.
GIB_PER_JOB = {"c++": 2.0, "cuda": 4.0}


def max_jobs(cuda: bool, environ: Mapping[str, str] = os.environ) -> int:
    """MAX_JOBS as the user set it, else one job a core, as far as memory reaches."""
    if environ.get("MAX_JOBS"):
        return int(environ["MAX_JOBS"])
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    by_memory = int(memory_gib / GIB_PER_JOB["cuda" if cuda else "c++"])
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def nvcc_threads(architectures: str) -> int:
    """How many of a file's architectures nvcc compiles at a time: the heaviest file bounds the build."""
    targets = architectures.count(";") + architectures.count("+PTX") + 1
    return min(targets, 4, len(os.sched_getaffinity(0)))
