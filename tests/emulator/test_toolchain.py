"""Finding nvcc, compiling with it, and compiling no more often than needed."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess

import pytest

from tests.emulator import toolchain
from tests.emulator.toolchain import (
    CompileError,
    ToolkitMissing,
    compile_launchers,
    compile_ptx,
    cutlass_include,
    find_toolkit,
)

KERNEL = """
#include "value.h"
__global__ void set(int* out) { *out = VALUE; }
"""

# What nvcc's host code calls to register a fat binary with the runtime, of CUDA 12 and of CUDA 13.
REGISTRATION = (
    "RegisterFatBinary",
    "RegisterFatBinaryEnd",
    "UnregisterFatBinary",
    "RegisterFunction",
    "RegisterVar",
    "InitModule",
    "GetKernel",
    "LaunchKernel",
    "PopCallConfiguration",
    "PushCallConfiguration",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def toolkit():
    try:
        return find_toolkit()
    except ToolkitMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def counted(toolkit, tmp_path):
    """The toolkit with an nvcc that counts its runs, and the count."""
    log = tmp_path / "runs"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho run >> "{log}"\nexec "{toolkit.nvcc}" "$@"\n')
    nvcc.chmod(0o755)
    log.touch()
    return dataclasses.replace(toolkit, nvcc=nvcc), lambda: len(log.read_text().splitlines())


@pytest.fixture
def kernel(tmp_path):
    directory = tmp_path / "a directory"
    directory.mkdir()
    (directory / "value.h").write_text("#define VALUE 4321\n")
    source = directory / "set.cu"
    source.write_text(KERNEL)
    return source


@pytest.fixture
def runtime(tmp_path):
    """A shared library in cudart's place whose cudaGetLastError always returns 77."""
    source = tmp_path / "runtime.cpp"
    stubs = "\n".join(f"void* __cuda{name}() {{ return nullptr; }}" for name in REGISTRATION)
    source.write_text(f'extern "C" {{\n{stubs}\nint cudaGetLastError() {{ return 77; }}\n}}\n')
    library = tmp_path / "lib" / "libruntime.so"
    library.parent.mkdir()
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def test_the_system_toolkit_is_complete(toolkit):
    assert os.access(toolkit.nvcc, os.X_OK)
    assert os.access(toolkit.ptxas, os.X_OK)
    assert any((directory / "cuda_runtime_api.h").is_file() for directory in toolkit.include)
    assert toolkit.version in subprocess.check_output([toolkit.nvcc, "--version"], text=True)


def fake_pypi_toolkit(site_directory, printed):
    root = site_directory / "nvidia" / "cu13"
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{printed}\nEND\n")
    nvcc.chmod(0o755)
    return root


def test_a_toolkit_from_pypi_is_found_where_the_system_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "find_system_toolkit", lambda: None)
    root = tmp_path / "site-packages" / "nvidia" / "cu13"
    printed = (
        f'#$ INCLUDES="-I{root}/bin/..//include"  \n'
        f'#$ SYSTEM_INCLUDES="-isystem" "{root}/bin/..//include/cccl"  \n'
        "#$ gcc -E -D__CUDACC_VER_MAJOR__=13 -D__CUDACC_VER_MINOR__=0 -D__CUDACC_VER_BUILD__=88 null"
    )
    assert fake_pypi_toolkit(tmp_path / "site-packages", printed) == root
    found = find_toolkit([str(tmp_path / "elsewhere"), str(tmp_path / "site-packages")])
    assert found == toolchain.Toolkit(
        nvcc=root / "bin" / "nvcc",
        ptxas=root / "bin" / "ptxas",
        include=(root / "include", root / "include" / "cccl"),
        version="13.0.88",
        origin="pypi",
    )


def test_a_missing_toolkit_is_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "find_system_toolkit", lambda: None)
    with pytest.raises(ToolkitMissing, match=r"no nvcc .* pip install 'nvidia-cuda-nvcc==13\.0\.\*'"):
        find_toolkit([str(tmp_path)])


def test_a_broken_nvcc_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "find_system_toolkit", lambda: None)
    fake_pypi_toolkit(tmp_path, "no space left")
    with pytest.raises(ToolkitMissing, match=r"nvcc --dryrun names no version, it printed: 'no space left'"):
        find_toolkit([str(tmp_path)])


def test_cutlass_is_found_or_named(monkeypatch):
    pytest.importorskip("cutlass_library", exc_type=ImportError)
    assert (cutlass_include() / "cutlass" / "cutlass.h").is_file()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install nvidia-cutlass"):
        cutlass_include()


def test_ptx_has_the_architecture_and_line_numbers(toolkit, kernel):
    ptx = compile_ptx(kernel, arch="sm_90a", toolkit=toolkit).read_text()
    assert ".target sm_90a" in ptx
    assert ".loc" in ptx
    assert "4321" in ptx


def test_an_unchanged_source_is_compiled_once(counted, kernel):
    toolkit, runs = counted
    first = compile_ptx(kernel, toolkit=toolkit)
    os.utime(kernel.with_name("value.h"), (1, 1))  # a checkout changes times, not contents
    assert compile_ptx(kernel, toolkit=toolkit) == first
    assert runs() == 1


def test_an_included_header_that_changes_is_compiled_in(counted, kernel):
    toolkit, runs = counted
    compile_ptx(kernel, toolkit=toolkit)
    kernel.with_name("value.h").write_text("#define VALUE 8765\n")
    assert "8765" in compile_ptx(kernel, toolkit=toolkit).read_text()
    assert runs() == 2


def test_a_source_that_changes_is_compiled_again(counted, kernel):
    toolkit, runs = counted
    compile_ptx(kernel, toolkit=toolkit)
    kernel.write_text(KERNEL.replace("VALUE;", "VALUE + 1;"))
    assert "4322" in compile_ptx(kernel, toolkit=toolkit).read_text()
    assert runs() == 2


def test_options_and_toolkits_do_not_share_a_result(counted, kernel):
    toolkit, runs = counted
    kernel.with_name("value.h").unlink()
    kernel.write_text(KERNEL.replace('#include "value.h"', ""))
    results = {compile_ptx(kernel, defines=[f"VALUE={value}"], toolkit=toolkit) for value in (1, 2)}
    other = dataclasses.replace(toolkit, version="13.0.0")
    results.add(compile_ptx(kernel, defines=["VALUE=1"], toolkit=other))
    results.add(compile_ptx(kernel, defines=["VALUE=1"], options=["--use_fast_math"], toolkit=toolkit))
    assert len(results) == runs() == 4


def test_a_compile_error_is_quoted_and_nothing_is_kept(toolkit, kernel):
    compile_ptx(kernel, toolkit=toolkit)
    source = kernel.read_text()
    kernel.write_text("#error the reason\n")
    for _ in range(2):
        with pytest.raises(CompileError, match=r"(?s)nvcc failed on set\.cu:.*the reason"):
            compile_ptx(kernel, toolkit=toolkit)
    kernel.write_text(source)
    assert "4321" in compile_ptx(kernel, toolkit=toolkit).read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"arch": "80"}, ValueError, "arch must be .* such as sm_80 or sm_90a, got '80'"),
        ({"defines": "VALUE"}, TypeError, "defines must be a sequence, got the single value 'VALUE'"),
        ({"include": "include"}, TypeError, "include must be a sequence"),
        ({"options": "-O1"}, TypeError, "options must be a sequence"),
    ],
)
def test_bad_arguments_are_named(toolkit, kernel, arguments, error, message):
    with pytest.raises(error, match=message):
        compile_ptx(kernel, toolkit=toolkit, **arguments)


def test_missing_files_are_named(toolkit, kernel, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source must be a file, .*missing\.cu is none"):
        compile_ptx(tmp_path / "missing.cu", toolkit=toolkit)
    with pytest.raises(FileNotFoundError, match=r"library must be a file, .*missing\.so is none"):
        compile_launchers([kernel], arch="sm_80", library=tmp_path / "missing.so", toolkit=toolkit)
    with pytest.raises(ValueError, match=r"sources must be a sequence of at least one file, got \[\]"):
        compile_launchers([], arch="sm_80", library=kernel, toolkit=toolkit)


def test_launchers_run_on_the_library_in_cudarts_place(counted, kernel, runtime):
    toolkit, runs = counted
    host = kernel.with_name("host.cpp")
    host.write_text('#include <cuda_runtime_api.h>\nextern "C" int last() { return cudaGetLastError(); }\n')

    def build():
        return compile_launchers([kernel, host], arch="sm_80", library=runtime, toolkit=toolkit)

    library = build()
    assert ctypes.CDLL(str(library)).last() == 77
    assert build() == library
    assert runs() == 3  # two sources and the link

    contents = library.read_bytes()
    assert b".target sm_80" in contents  # the PTX, uncompressed
    assert contents.count(b"\x7fELF") == 2  # the library's own header, and the machine code's

    host.write_text(host.read_text().replace("return", "return 1 +"))
    assert build() == library
    assert runs() == 5  # one source and the link


def test_a_runtime_function_that_the_library_lacks_is_named(toolkit, kernel, runtime):
    host = kernel.with_name("host.cpp")
    host.write_text('#include <cuda_runtime_api.h>\nextern "C" int reset() { return cudaDeviceReset(); }\n')
    with pytest.raises(CompileError, match="undefined reference to `cudaDeviceReset'"):
        compile_launchers([host], arch="sm_80", library=runtime, toolkit=toolkit)
