"""The package as users install it: built from an sdist against the torch at hand, run from elsewhere.

FUSED_LORA_SECOND_PYTHON names a Python that has another torch build; everything is built and run there
too. A binary of one torch must never be loaded by the other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fused_lora
from build_support.toolkit import find_toolkit

ROOT = Path(__file__).parent.parent.parent
SECOND_PYTHON = os.environ.get("FUSED_LORA_SECOND_PYTHON")

RUN = """
import json, warnings, torch
import fused_lora
warnings.simplefilter("error", fused_lora.FusedLoRAWarning)
x = torch.randn(3, 8, requires_grad=True)
layer = fused_lora.LoRALinear(8, 4, r=2, dropout=0.5)
layer(x).sum().backward()
assert layer.lora_B["default"].grad.any()
from fused_lora import reference
seed = torch.tensor([5])
assert torch.equal(fused_lora.dropout_mask(seed, 30, 41, 0.3), reference.dropout_mask(seed, 30, 41, 0.3))
args = (x, layer.weight, layer.lora_A["default"], torch.randn(4, 2), layer.bias)
options = dict(scaling=2.0, dropout_p=0.3, seed=seed)
torch.testing.assert_close(fused_lora.lora_linear(*args, **options), reference.lora_linear(*args, **options))
torch.library.opcheck(torch.ops.fused_lora.lora_linear, args, options)
print(json.dumps({"file": fused_lora.__file__, "path": fused_lora.explain(),
                  "facts": fused_lora.binary.BINARY.facts, "torch": torch.__version__,
                  "cuda": torch.version.cuda}))
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FUSED_LORA_PATH", "FORCE_CUDA")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*command: object, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unpacked sdist: nothing of the checkout, of its binary or of its build folder."""
    work = tmp_path_factory.mktemp("sdist")
    tree = work / "tree"
    tracked = succeed("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_sdist('..'))"
    succeed(sys.executable, "-c", build, cwd=tree)
    (archive,) = work.glob("fused_lora-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz")


SECOND = pytest.param(
    SECOND_PYTHON,
    id="second torch",
    marks=pytest.mark.skipif(
        not SECOND_PYTHON,
        reason="FUSED_LORA_SECOND_PYTHON is not set: make test SECOND_TORCH=torch==… makes one",
    ),
)
PYTHONS = [pytest.param(sys.executable, id="this torch"), SECOND]


class Installed(NamedTuple):
    python: str
    site: Path  # holds the package
    printed: str  # by the build


def install(python: str, source: Path, work: Path, **environment: str) -> Installed:
    printed = succeed(
        *(python, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", work, "."),
        cwd=source,
        **environment,
    )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return Installed(python, work / "site", printed)


@pytest.fixture(scope="module")
def installs() -> dict[str, Installed]:
    """What has been built so far, by Python: a build takes a minute."""
    return {}


@pytest.fixture
def installed(request, installs, source, tmp_path_factory):
    """The package, built and installed for the Python asked for."""
    if request.param not in installs:
        # One architecture: the others compile in tests of their own.
        work = tmp_path_factory.mktemp("wheel")
        installs[request.param] = install(request.param, source, work, TORCH_CUDA_ARCH_LIST="8.0")
    return installs[request.param]


def toolkit_for(python: str, cuda: str) -> bool:
    """Whether a build finds a toolkit, which may be one of the Python's own packages."""
    code = "import sys; print('\\n'.join(sys.path))"
    paths = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return find_toolkit(cuda, site_directories=paths) is not None


def binary_of(installed: Installed) -> Path:
    (path,) = (installed.site / "fused_lora").glob("_C.*.so")
    return path


@pytest.mark.parametrize("installed", PYTHONS, indirect=True)
class TestInstalled:
    def test_it_runs_from_elsewhere(self, installed, tmp_path):
        printed = succeed(installed.python, "-c", RUN, cwd=tmp_path, PYTHONPATH=str(installed.site))
        told = json.loads(printed.splitlines()[-1])
        assert Path(told["file"]).parent.parent == installed.site
        assert told["path"] == fused_lora.explain()
        assert told["facts"]["torch"] == told["torch"]
        assert told["facts"]["torch_cuda"] == (told["cuda"] or "none")

    def test_the_decision_and_its_reason_are_printed(self, installed, tmp_path):
        code = "import torch; print(torch.version.cuda)"
        cuda = succeed(installed.python, "-c", code, cwd=tmp_path).split()[-1]
        if cuda == "None":
            line = "off: torch is a CPU build (torch.version.cuda is None)"
        elif toolkit_for(installed.python, cuda):
            line = f"on: torch has CUDA {cuda}, toolkit "
        else:
            line = f"off: torch has CUDA {cuda} but no toolkit was found"
        assert f"fused-lora: CUDA kernels {line}" in installed.printed

    def test_it_holds_what_users_need_and_nothing_else(self, installed):
        files = {path.name for path in (installed.site / "fused_lora").iterdir()}
        assert {"py.typed", "_C.pyi", "_build.json", "__init__.py", binary_of(installed).name} <= files
        tops = {path.name for path in installed.site.iterdir() if path.suffix != ".dist-info"}
        assert tops == {"fused_lora"}

    def test_at_parallel_for_is_parallel(self, installed, tmp_path):
        """OpenMP missing from either half of the build would leave it serial, without a word."""
        symbols = succeed("nm", "-D", "--undefined-only", binary_of(installed), cwd=tmp_path)
        assert "GOMP_parallel" in symbols


@pytest.mark.parametrize(
    ("installed", "other"),
    [pytest.param(sys.executable, SECOND_PYTHON, marks=SECOND.marks)],
    indirect=["installed"],
)
def test_the_binary_of_one_torch_is_refused_by_another(installed, other, tmp_path):
    code = "import fused_lora; print(fused_lora.binary.BINARY.problem); print(fused_lora.explain())"
    told = succeed(other, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed.site)).splitlines()
    assert "is not loaded: it was built for torch" in told[0]
    assert told[1].startswith("reference: ")


def test_a_build_without_torch_says_how_to_build(source):
    hide = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    done = run(sys.executable, "-c", hide, cwd=source)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_forced_cuda_build_that_cannot_be_is_an_error(source):
    done = run(sys.executable, "setup.py", "build_ext", cwd=source, FORCE_CUDA="1")
    assert done.returncode != 0
    assert "fused-lora: FORCE_CUDA=1, but torch is a CPU build" in done.stderr


@pytest.fixture
def with_cuda(installed):
    """The second torch's build, where it has the CUDA kernels."""
    if "CUDA kernels on" not in installed.printed:
        pytest.skip("the second torch has no CUDA, or no CUDA toolkit is installed")
    return installed


@pytest.mark.parametrize("installed", [SECOND], indirect=True)
class TestCudaBuild:
    def test_it_is_compiled_for_what_was_asked(self, with_cuda):
        assert "fused-lora: compiled for 8.0 (TORCH_CUDA_ARCH_LIST)" in with_cuda.printed
        facts = json.loads((with_cuda.site / "fused_lora" / "_build.json").read_text())
        assert (facts["cuda"], facts["architectures"]) == ("yes", "8.0")

    def test_every_symbol_is_found_without_a_gpu(self, with_cuda, tmp_path):
        """Bound at once, not at the first call that would need it."""
        code = "import fused_lora; print(fused_lora.binary.BINARY.problem)"
        printed = succeed(
            *(with_cuda.python, "-c", code), cwd=tmp_path, PYTHONPATH=str(with_cuda.site), LD_BIND_NOW="1"
        )
        assert printed.splitlines()[-1] == "None"

    def test_libcudart_is_torchs_own(self, with_cuda, tmp_path):
        needed = succeed("readelf", "-d", binary_of(with_cuda), cwd=tmp_path)
        assert re.search(r"NEEDED.*libcudart\.so\.\d+\]", needed)
        assert "RPATH" not in needed
        assert "RUNPATH" not in needed

    def test_every_op_has_a_cuda_implementation(self, with_cuda, tmp_path):
        printed = succeed(with_cuda.python, "-c", CUDA_RUN, cwd=tmp_path, PYTHONPATH=str(with_cuda.site))
        told = json.loads(printed.splitlines()[-1])
        assert told["implemented"] == [True] * 3
        assert told["fake"] == [
            "cuda:0 [3, 64] torch.bfloat16",
            "cuda:0 [3, 32] torch.bfloat16",
            "cuda:0 [8, 32] torch.float32",
            "cuda:0 [64, 8] torch.float32",
        ]
        if told["gpu"]:
            return
        assert "NVIDIA" in told["error"]
        assert "tensor cores" in told["explained"]
        assert "an A100 (no GPU is at hand)" in told["explained"]


CUDA_RUN = """
import json, torch
from torch._subclasses import FakeTensorMode
import fused_lora
ops = ("lora_linear_forward", "lora_linear_backward", "dropout_mask")
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
told = {"implemented": [has_kernel("fused_lora::" + name, "CUDA") for name in ops]}
with FakeTensorMode():
    # By the halves: autograd's engine itself asks for the device.
    x, weight = (torch.empty(n, 32, device="cuda", dtype=torch.bfloat16) for n in (3, 64))
    a, b = torch.empty(8, 32, device="cuda"), torch.empty(64, 8, device="cuda")
    tail = (1.0, 0.5, torch.empty(1, dtype=torch.int64, device="cuda"), False)
    y, h = torch.ops.fused_lora.lora_linear_forward(x, weight, a, b, None, *tail)
    needed = [True, False, True, True, False]
    gradients = torch.ops.fused_lora.lora_linear_backward(y, x, weight, a, b, h, *tail, needed)
    results = (y, *(g for g, wanted in zip(gradients, needed) if wanted))
told["fake"] = [f"{t.device} {list(t.shape)} {t.dtype}" for t in results]
told["gpu"] = torch.cuda.is_available()
if not told["gpu"]:
    told["explained"] = fused_lora.explain("cuda", rows=4096, in_features=4096, out_features=4096)
    try:
        fused_lora.dropout_mask(torch.tensor([1]).to("cuda"), 3, 4, 0.5)
    except Exception as error:
        told["error"] = str(error)
print(json.dumps(told))
"""


def test_every_module_of_the_package_imports_with_torch_alone(tmp_path):
    """PEFT, transformers and safetensors are extras: asked for when they are needed, by name."""
    code = """
import sys
for extra in ("peft", "transformers", "safetensors", "numpy"):
    sys.modules[extra] = None
import torch, fused_lora
model = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(8, 4)})
print(fused_lora.add_lora(model, r=2))
for call in (lambda: fused_lora.fuse(model), lambda: fused_lora.save_adapter(model, "adapter"),
             lambda: __import__("fused_lora.cli").cli.describe_targets(__import__("pathlib").Path("."), 4)):
    try:
        call()
    except ImportError as error:
        print("ImportError:", error)
"""
    told = succeed(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    for extra in ("peft", "safetensors", "transformers"):
        assert f"pip install {extra}" in told
    assert not (tmp_path / "adapter").exists()
