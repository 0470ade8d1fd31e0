"""The static report, on kernels whose instructions are written out."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest

from tests.emulator import toolchain
from tests.emulator.devices import DEVICES
from tests.emulator.main_loop import LoopMix, main_loops
from tests.emulator.static_report import format_report, main, static_report
from tests.emulator.toolchain import CompileError, compile_ptx, find_toolkit

MMA = r"""
#include <cstdint>

__device__ void mma(float (&d)[4], const uint32_t (&a)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%4, %5}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
}
"""

# Inline assembly that is volatile stays as it is written, once in each iteration.
KERNELS = r"""
// One of each kind in an iteration, and two of ldmatrix and eight of mma.
extern "C" __global__ void __launch_bounds__(128) gemm(float* out, const float* in, int k_tiles) {
  __shared__ alignas(16) uint32_t tile[1024];
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + threadIdx.x * 16;
  float d[4] = {};
  uint32_t a[4];
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k) {
    float moved;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(moved) : "l"(in) : "memory");
    asm volatile("st.global.f32 [%0], %1;" ::"l"(out + 4), "f"(moved) : "memory");
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(moved) : "memory");
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + 2048), "l"(in) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    for (int i = 0; i < 2; ++i) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory");
      for (int j = 0; j < 4; ++j) mma(d, a);
    }
  }
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}

// The loop over tiles holds more matrix instructions than the loop over k inside it.
extern "C" __global__ void persistent(float* out, int tiles, int k_tiles) {
  uint32_t a[4] = {threadIdx.x, 2, 3, 4};
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float d[4] = {};
    for (int i = 0; i < 5; ++i) mma(d, a);
#pragma unroll 1
    for (int k = 0; k < k_tiles; ++k)
      for (int i = 0; i < 3; ++i) mma(d, a);
    for (int i = 0; i < 4; ++i) out[4 * tile + i] = d[i];
  }
}

// 40 values that live through the loop.
extern "C" __global__ void pressure(float* out, const float* in, int steps) {
  float kept[40];
  for (int i = 0; i < 40; ++i) kept[i] = in[i];
#pragma unroll 1
  for (int step = 0; step < steps; ++step)
    for (int i = 0; i < 40; ++i) kept[i] = kept[i] * kept[(i + 7) % 40] + in[step];
  for (int i = 0; i < 40; ++i) out[i] = kept[i];
}

template <int kRank>
__global__ void straight(float* out) {
  out[threadIdx.x] = kRank;
}
template __global__ void straight<RANK>(float*);
"""

BARE_PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry bare(.param .u64 pointer) // .maxntid 512 in a comment bounds nothing
.reqntid 16, 4, 2 { ret; }
.visible .entry unbounded() { ret; }
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Sources in temporary directories are not compiled twice: what they leave need not be kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "kernels.cu"
    path.write_text(MMA + KERNELS)
    return path


@pytest.fixture(scope="module")
def ptx(kernels):
    return compile_ptx(kernels, arch="sm_80", defines=["RANK=16"])


@pytest.fixture(scope="module")
def reports(ptx):
    return {report.demangled: report for report in static_report(ptx)}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "bare.ptx"
    path.write_text(BARE_PTX)
    return path


@pytest.fixture(scope="module")
def bare_reports(bare):
    return static_report(bare)


def test_the_mix_of_a_loop_is_what_was_written(reports):
    mix = reports["gemm"].main_loop
    assert dataclasses.replace(mix, other=0) == LoopMix(
        matrix=8,
        shared_loads=2,
        shared_stores=1,
        async_copies=1,
        global_loads=1,
        global_stores=1,
        local_accesses=0,
        barriers=3,  # __syncthreads, the commit and the wait
        branches=1,
        other=0,
    )
    assert mix.other >= 2  # to count and to compare
    assert mix.total == 8 + 2 + 1 + 1 + 1 + 1 + 3 + 1 + mix.other
    assert mix.others_per_matrix == (1 + 1 + 1 + 3 + 1 + mix.other) / 8


def test_the_main_loop_of_a_persistent_kernel_is_the_one_over_k(reports):
    assert reports["persistent"].main_loop.matrix == 3


def test_a_kernel_without_matrix_instructions_reports_its_largest_innermost_loop(reports):
    mix = reports["pressure"].main_loop
    assert mix.matrix == 0
    assert mix.global_loads == 1
    assert mix.total > 40
    assert math.isnan(mix.others_per_matrix)


def test_kernels_are_listed_by_their_names_which_are_demangled_and_kept(reports):
    assert list(reports) == ["gemm", "persistent", "pressure", "void straight<16>(float*)"]
    straight = reports["void straight<16>(float*)"]
    assert straight.name == "_Z8straightILi16EEvPf"
    assert straight.main_loop is None


def test_resources(reports):
    gemm = reports["gemm"].resources
    assert gemm.static_shared == 4096
    assert gemm.barriers == 1
    assert (gemm.stack, gemm.spill_stores, gemm.spill_loads) == (0, 0, 0)
    # On sm_80 the parameters, here one pointer, follow 0x160 bytes in bank 0.
    assert reports["void straight<16>(float*)"].resources.constant == 0x160 + 8
    assert reports["pressure"].resources.registers > 40


def test_forced_spills_are_seen_in_the_resources_and_in_the_loop(ptx, reports):
    options = ["-maxrregcount=28"]
    pressure = next(it for it in static_report(ptx, ptxas_options=options) if it.name == "pressure")
    used = pressure.resources
    assert used.registers <= 28
    assert min(used.stack, used.spill_stores, used.spill_loads) > 0
    command = [find_toolkit().ptxas, "-v", "-arch=sm_80", *options, ptx, "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = used.stack, used.spill_stores, used.spill_loads
    assert f"{stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads" in log
    assert pressure.main_loop.local_accesses > 0
    assert reports["pressure"].main_loop.local_accesses == 0


def test_a_source_reports_as_its_ptx_does(kernels, reports):
    assert static_report(kernels, arch="sm_80", defines=["RANK=16"]) == list(reports.values())


def test_a_cubin_tells_all_but_spills_barriers_and_threads(ptx, reports, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    subprocess.run([find_toolkit().ptxas, "-arch=sm_80", ptx, "-o", cubin], check=True)
    untold = {"spill_stores": None, "spill_loads": None, "barriers": None}
    expected = {
        report.name: dataclasses.replace(
            report, resources=dataclasses.replace(report.resources, **untold), threads=None
        )
        for report in reports.values()
    }
    assert {report.name: report for report in static_report(cubin)} == expected
    with pytest.raises(ValueError, match=r"arch is 'sm_90', but .*kernels.cubin holds code for sm_80"):
        static_report(cubin, arch="sm_90")


def test_threads_come_from_the_kernel_or_the_caller(bare, bare_reports):
    assert [report.threads for report in bare_reports] == [128, None]
    others = static_report(bare, arch="sm_120", threads=64)
    assert [(report.arch, report.threads) for report in others] == [("sm_120", 64), ("sm_120", 64)]
    with pytest.raises(ValueError, match="threads is 129, but bare allows 128 at most"):
        static_report(bare, threads=129)


def test_occupancy_counts_static_and_dynamic_shared_memory_and_barriers(ptx):
    gemm = next(report for report in static_report(ptx, dynamic_shared=45 << 10) if report.name == "gemm")
    # 4 + 45 + 1 KiB reserved: three times in the A100's 164 KiB, twice in the L4's 100.
    assert gemm.occupancy(DEVICES["a100"]).blocks == 3
    assert gemm.occupancy(DEVICES["l4"]).blocks == 2
    crowded = dataclasses.replace(gemm.resources, barriers=16)
    assert dataclasses.replace(gemm, resources=crowded).occupancy(DEVICES["rtx5090"]).blocks == 1
    with pytest.raises(ValueError, match="threads must be given for gemm"):
        dataclasses.replace(gemm, threads=None).occupancy(DEVICES["a100"])


def test_a_wait_that_spins_in_the_main_loop_is_not_taken_for_it(tmp_path):
    """ptxas puts the spinning part of an mbarrier's wait behind the kernel, from where it jumps back."""
    source = tmp_path / "wait.cu"
    source.write_text(
        MMA
        + r"""
extern "C" __global__ void wait(float* out, uint32_t bar, int k_tiles) {
  uint32_t a[4] = {1, 2, 3, 4};
  float d[4] = {};
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;"
                 "@done bra.uni finished; bra.uni again; finished: }" ::"r"(bar), "r"(k & 1) : "memory");
    mma(d, a);
    mma(d, a);
  }
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}
"""
    )
    (wait,) = static_report(source, arch="sm_90")
    assert wait.main_loop.matrix == 2
    assert wait.main_loop.barriers >= 1
    assert wait.main_loop.global_stores == 0


def listing(text):
    """What nvdisasm prints of a function with these labels and instructions."""
    lines = ["\t.target\tsm_90", '\t.section\t.text.listed,"ax",@progbits', "listed:", ".text.listed:"]
    for address, line in enumerate(text.strip().splitlines()):
        label = line.strip().startswith(".L")
        lines.append(line.strip() if label else f"        /*{address:04x}*/  {line.strip()} ;")
    return "\n".join(lines)


def test_code_out_of_line_belongs_to_the_loop_that_it_returns_to():
    code = """
            MOV R1, c[0x0][0x28]
        .L_x_0:
            LDS R2, [R1]
            @!P1 BRA `(.L_x_3)
        .L_x_1:
            @!PT LDS RZ, [RZ]
            BRA.U !UP0, `(.L_x_0)
            EXIT
        .L_x_2:
            BRA `(.L_x_2)
        .L_x_3:
            BRX R2 -0x80 {targets}
            NOP
    """
    mix = main_loops(listing(code.replace("{targets}", '(*"BRANCH_TARGETS .L_x_1,.L_x_1"*)')))["listed"]
    # One LDS; and BRA, BRA.U, BRX and the LDS that is never executed. The loop at .L_x_2 is not reached.
    assert mix == LoopMix(0, 1, 0, 0, 0, 0, 0, 0, 3, 1)
    with pytest.raises(ValueError, match="nvdisasm names no target of BRX R2 -0x80"):
        main_loops(listing(code.replace("{targets}", "")))


def test_a_detour_behind_the_kernel_is_no_loop():
    code = """
            @!P1 BRA `(.L_x_1)
        .L_x_0:
            EXIT
        .L_x_1:
            FADD R0, R0, R1
            BRA `(.L_x_0)
    """
    assert main_loops(listing(code)) == {"listed": None}


def test_the_most_matrix_instructions_decide_and_not_the_size():
    code = """
            BRA.U !UP0, `(.L_x_1)
        .L_x_0:
            IMMA.16832.S8.S8 R4, R4.ROW, R8.COL, R4
            HMMA.16816.F32 R4, R4, R8, R4
            @P0 BRA `(.L_x_0)
        .L_x_1:
            HMMA.16816.F32 R4, R4, R8, R4
            IADD3 R9, R9, 0x1, RZ
            IADD3 R9, R9, 0x1, RZ
            @P0 BRA `(.L_x_1)
            EXIT
    """
    assert main_loops(listing(code))["listed"] == LoopMix(2, 0, 0, 0, 0, 0, 0, 0, 1, 0)


def test_of_loops_with_as_many_matrix_instructions_the_smallest_is_the_main_loop():
    """The others handle the ragged ends of a reduction."""
    code = """
        .L_x_0:
            HMMA.16816.F32 R4, R4, R8, R4
            IADD3 R9, R9, 0x1, RZ
            @P0 BRA `(.L_x_0)
        .L_x_1:
            HMMA.16816.F32 R4, R4, R8, R4
            @P0 BRA `(.L_x_1)
            EXIT
    """
    assert main_loops(listing(code))["listed"] == LoopMix(1, 0, 0, 0, 0, 0, 0, 0, 1, 0)


def test_the_kinds_of_hoppers_instructions():
    code = """
        .L_x_0:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
            UTMALDG.2D [UR8], [UR6], desc[URZ]
            WARPGROUP.ARRIVE
            HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
            WARPGROUP.DEPBAR.LE gsb0, 0x0
            LDL R3, [R1]
            STL.64 [R1], R3
            STSM.16.M88.4 [R4], R8
            FENCE.VIEW.ASYNC.S
            UTMASTG.2D [UR8], [UR6]
            UTMACMDFLUSH
            LDG.E.128 R4, desc[UR4][R6.64]
            STG.E.64 desc[UR4][R6.64], R4
            @P0 BRA `(.L_x_0)
            EXIT
    """
    assert main_loops(listing(code))["listed"] == LoopMix(
        matrix=1,
        shared_loads=0,
        shared_stores=1,
        async_copies=2,
        global_loads=1,
        global_stores=1,
        local_accesses=2,
        barriers=5,
        branches=1,
        other=0,
    )


def test_the_table_states_the_figures(reports):
    launches = [dataclasses.replace(report, dynamic_shared=45 << 10) for report in reports.values()]
    lines = format_report(launches).splitlines()
    assert max(map(len, lines)) <= 110
    row = [report.name for report in reports.values()].index("gemm") + 1
    name, resources, mix, blocks = (line.split() for line in lines if line.startswith(f"{row:>3}  "))
    gemm = reports["gemm"]
    assert name[1:] == ["sm_80", "gemm"]
    assert resources[1] == str(gemm.resources.registers)
    assert resources[-1] == str(45 << 10)
    assert mix[1:3] == ["8", "2"]
    assert mix[-1] == f"{gemm.main_loop.others_per_matrix:.2f}"
    # The L4 runs sm_80's machine code and the H100 does not.
    assert " ".join(blocks[1:]).startswith("128 3 19% s 4 25% s* 2 17% s 2 17% s")


def test_the_command_line_prints_the_table(bare, bare_reports, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["static_report", str(bare), "--dynamic-shared", "1024"])
    main()
    launches = [dataclasses.replace(report, dynamic_shared=1024) for report in bare_reports]
    assert capsys.readouterr().out == format_report(launches) + "\n"
    monkeypatch.setattr(sys, "argv", ["static_report", str(bare), "--threads", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "threads must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "ampere"}, "arch must be like 'sm_80' or 'sm_90a', got 'ampere'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dynamic_shared": -1}, "dynamic_shared must be at least 0, got -1"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(bare, arguments, message):
    with pytest.raises(ValueError, match=message):
        static_report(bare, **arguments)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("targetless.ptx", ".version 8.0", "source must name its .target, .*targetless.ptx does not"),
        ("empty.ptx", ".version 8.0\n.target sm_80\n", "source must hold a kernel, .*empty.ptx has none"),
        ("broken.cubin", "no machine code", "cuobjdump failed"),
        ("kernel.txt", "", "source must end in .cu, .ptx or .cubin, got .*kernel.txt"),
        ("kernel.cu", "", "arch must be given to compile .*kernel.cu"),
    ],
)
def test_files_without_kernels_are_errors(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        static_report(path)


def test_what_ptxas_refuses_is_an_error(bare, tmp_path):
    with pytest.raises(CompileError, match=r"ptxas failed: .*sm_999"):
        static_report(bare, arch="sm_999")
    with pytest.raises(CompileError, match=r"ptxas failed: .*nonsense"):
        static_report(bare, ptxas_options=["-nonsense"])
    broken = tmp_path / "broken.ptx"
    broken.write_text(BARE_PTX.replace("ret;", "rot;"))
    with pytest.raises(CompileError, match=r"ptxas failed: .*broken.ptx, line 6"):
        static_report(broken)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source must be a file, got .*missing.ptx"):
        static_report(tmp_path / "missing.ptx")
