"""What setup.py decides before it compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from build_support import facts, jobs
from build_support.toolkit import BuildError, Toolkit, decide, find_toolkit

SOURCES = ["csrc/kernels/gemm.cu"]
TOOLKIT = Toolkit(Path("/opt/cuda"), "13.0")


def test_cuda_is_built_where_torch_has_it_and_a_toolkit_fits():
    decision = decide("13.0", TOOLKIT, None, SOURCES)
    assert decision.cuda
    assert decision.reason == "torch has CUDA 13.0, toolkit 13.0 at /opt/cuda"


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "sources", "reason"),
    [
        (None, TOOLKIT, SOURCES, "torch is a CPU build"),
        ("13.0", None, SOURCES, "no toolkit was found"),
        ("12.8", TOOLKIT, SOURCES, "torch has CUDA 12.8 and the toolkit at /opt/cuda is 13.0"),
        ("13.0", TOOLKIT, [], "this version has no CUDA sources"),
    ],
)
def test_each_obstacle_is_a_reason_by_default_and_an_error_by_force(torch_cuda, toolkit, sources, reason):
    for force in (None, ""):
        decision = decide(torch_cuda, toolkit, force, sources)
        assert not decision.cuda
        assert reason in decision.reason
    with pytest.raises(BuildError, match="FORCE_CUDA=1, but"):
        decide(torch_cuda, toolkit, "1", sources)


def test_force_cuda_0_switches_it_off():
    assert decide("13.0", TOOLKIT, "0", SOURCES).reason == "FORCE_CUDA=0"


def test_force_cuda_takes_0_and_1():
    with pytest.raises(BuildError, match="FORCE_CUDA must be 0 or 1, got 'yes'"):
        decide("13.0", TOOLKIT, "yes", SOURCES)


def fake_nvcc(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


RELEASE = 'echo "Cuda compilation tools, release 12.8, V12.8.93"'


def test_cuda_home_names_the_toolkit(tmp_path):
    fake_nvcc(tmp_path / "bin" / "nvcc", RELEASE)
    assert find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": ""}) == Toolkit(tmp_path, "12.8")
    assert find_toolkit({"CUDA_PATH": str(tmp_path), "PATH": ""}) == Toolkit(tmp_path, "12.8")


def test_a_cuda_home_without_nvcc_is_an_error(tmp_path):
    with pytest.raises(BuildError, match=f"CUDA_HOME={tmp_path} holds no bin/nvcc"):
        find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": ""})


def test_a_wrapper_on_path_is_asked_for_its_toolkit(tmp_path):
    """A script that calls nvcc elsewhere: the toolkit is where the real one says it is."""
    real = tmp_path / "toolkit"
    dryrun = f'[ "$1" = --dryrun ] && {{ echo "#\\$ TOP={real}/bin/.." >&2; exit 0; }}'
    fake_nvcc(real / "bin" / "nvcc", f"{dryrun}\n{RELEASE}")
    fake_nvcc(tmp_path / "wrappers" / "nvcc", f'exec {real}/bin/nvcc "$@"')
    found = find_toolkit({"PATH": f"{tmp_path / 'wrappers'}:{os.environ['PATH']}"})
    assert found == Toolkit(real.resolve(), "12.8")


def test_an_nvcc_that_names_no_release_is_an_error(tmp_path):
    fake_nvcc(tmp_path / "bin" / "nvcc", "echo broken")
    with pytest.raises(BuildError, match=r"--version names no release, it printed: 'broken'"):
        find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": ""})


def test_max_jobs_is_the_users_where_given():
    assert jobs.max_jobs(cuda=True, environ={"MAX_JOBS": "37"}) == 37


def test_max_jobs_is_capped_by_cores_and_memory(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    memory = {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 16 * 2**18}  # 16 GiB
    monkeypatch.setattr(os, "sysconf", memory.get)
    assert jobs.max_jobs(cuda=False, environ={}) == 8
    assert jobs.max_jobs(cuda=True, environ={}) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert jobs.max_jobs(cuda=False, environ={}) == 1


def test_the_facts_header_is_written_only_when_it_changes(tmp_path):
    header = tmp_path / "include" / "build_facts.h"
    facts.write_header({"torch": '2.13.0"cpu'}, header)
    assert '{"torch", "2.13.0\\"cpu"}' in header.read_text()
    os.utime(header, (1, 1))
    facts.write_header({"torch": '2.13.0"cpu'}, header)
    assert header.stat().st_mtime == 1
    facts.write_header({"torch": "2.14.0"}, header)
    assert header.stat().st_mtime > 1


def test_the_commit_of_what_is_no_checkout_is_unknown(tmp_path):
    assert facts.commit(tmp_path) == "unknown"
