"""What setup.py decides before it compiles."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from build_support import facts, jobs
from build_support.toolkit import (
    BuildError,
    Toolkit,
    decide,
    find_system_toolkit,
    find_toolkit,
    runtime_library,
)

TOOLKIT = Toolkit(Path("/opt/cuda"), "13.0")


def test_cuda_is_built_where_torch_has_it_and_a_toolkit_fits():
    decision = decide("13.0", TOOLKIT, None)
    assert decision.cuda
    assert decision.reason == "torch has CUDA 13.0, toolkit 13.0 at /opt/cuda"


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "reason"),
    [
        (None, TOOLKIT, "torch is a CPU build"),
        (
            "13.0",
            None,
            "no toolkit was found .* or pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==",
        ),
        ("12.8", None, "no toolkit was found .* install one or set CUDA_HOME$"),  # PyPI has no nvcc for it
        ("12.8", TOOLKIT, "torch has CUDA 12.8 and the toolkit at /opt/cuda is 13.0"),
    ],
)
def test_each_obstacle_is_a_reason_by_default_and_an_error_by_force(torch_cuda, toolkit, reason):
    for force in (None, ""):
        decision = decide(torch_cuda, toolkit, force)
        assert not decision.cuda
        assert re.search(reason, decision.reason)
    with pytest.raises(BuildError, match="FORCE_CUDA=1, but"):
        decide(torch_cuda, toolkit, "1")


def test_force_cuda_0_switches_it_off():
    assert decide("13.0", TOOLKIT, "0").reason == "FORCE_CUDA=0"


def test_force_cuda_takes_0_and_1():
    with pytest.raises(BuildError, match="FORCE_CUDA must be 0 or 1, got 'yes'"):
        decide("13.0", TOOLKIT, "yes")


def fake_nvcc(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


RELEASE = 'echo "Cuda compilation tools, release 12.8, V12.8.93"'


def test_cuda_home_names_the_toolkit(tmp_path):
    fake_nvcc(tmp_path / "bin" / "nvcc", RELEASE)
    assert find_system_toolkit({"CUDA_HOME": str(tmp_path), "PATH": ""}) == Toolkit(tmp_path, "12.8")
    assert find_system_toolkit({"CUDA_PATH": str(tmp_path), "PATH": ""}) == Toolkit(tmp_path, "12.8")


def test_a_cuda_home_without_nvcc_is_an_error(tmp_path):
    with pytest.raises(BuildError, match=f"CUDA_HOME={tmp_path} holds no bin/nvcc"):
        find_system_toolkit({"CUDA_HOME": str(tmp_path), "PATH": ""})


def test_a_wrapper_on_path_is_asked_for_its_toolkit(tmp_path):
    """A script that calls nvcc elsewhere: the toolkit is where the real one says it is."""
    real = tmp_path / "toolkit"
    dryrun = f'[ "$1" = --dryrun ] && {{ echo "#\\$ TOP={real}/bin/.." >&2; exit 0; }}'
    fake_nvcc(real / "bin" / "nvcc", f"{dryrun}\n{RELEASE}")
    fake_nvcc(tmp_path / "wrappers" / "nvcc", f'exec {real}/bin/nvcc "$@"')
    found = find_system_toolkit({"PATH": f"{tmp_path / 'wrappers'}:{os.environ['PATH']}"})
    assert found == Toolkit(real.resolve(), "12.8")


@pytest.mark.parametrize(
    ("version", "enough"), [("12.6", False), ("12.8", True), ("12.10", True), ("13.0", True)]
)
def test_versions_compare_as_numbers(version, enough):
    assert Toolkit(Path("/opt/cuda"), version).at_least(12, 8) is enough


def test_an_nvcc_that_names_no_release_is_an_error(tmp_path):
    fake_nvcc(tmp_path / "bin" / "nvcc", "echo broken")
    with pytest.raises(BuildError, match=r"--version names no release, it printed: 'broken'"):
        find_system_toolkit({"CUDA_HOME": str(tmp_path), "PATH": ""})


@pytest.fixture
def pypi(tmp_path):
    """A directory of packages that holds PyPI's toolkit of CUDA 13."""
    fake_nvcc(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc", RELEASE.replace("12.8", "13.0"))
    return tmp_path / "site"


def test_pypis_toolkit_serves_where_the_system_has_none(pypi, monkeypatch):
    monkeypatch.setattr("build_support.toolkit.find_system_toolkit", lambda environ: None)
    expected = Toolkit(pypi / "nvidia" / "cu13", "13.0")
    for torch_cuda in (None, "13.0", "13.2"):
        assert find_toolkit(torch_cuda, {}, ["/nowhere", str(pypi)]) == expected
    assert find_toolkit("12.8", {}, [str(pypi)]) is None


def test_the_systems_toolkit_comes_first_where_it_fits_torch(pypi, monkeypatch):
    system = Toolkit(Path("/usr/local/cuda"), "12.8")
    monkeypatch.setattr("build_support.toolkit.find_system_toolkit", lambda environ: system)
    assert find_toolkit("12.6", {}, [str(pypi)]) == system
    assert find_toolkit("13.0", {}, [str(pypi)]) == Toolkit(pypi / "nvidia" / "cu13", "13.0")
    assert find_toolkit("13.0", {"CUDA_HOME": "/usr/local/cuda"}, [str(pypi)]) == system
    assert find_toolkit("13.0", {}, []) == system  # decide() then says that it does not fit


@pytest.mark.parametrize("name", ["lib64/libcudart.so", "lib/libcudart.so.13"])
def test_the_runtime_library_is_found_under_the_name_it_has(tmp_path, name):
    assert runtime_library(tmp_path) is None
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
    assert runtime_library(tmp_path) == tmp_path / name


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


def test_nvcc_compiles_architectures_side_by_side_as_far_as_there_are_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)))
    threads = [jobs.nvcc_threads(a) for a in ("8.0", "8.0+PTX", "8.0+PTX;9.0;10.0;12.0")]
    assert threads == [1, 2, 3]


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
