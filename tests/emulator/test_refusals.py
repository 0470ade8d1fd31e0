"""What is not modelled, or is no PTX, is refused by name; nothing is approximated in silence."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator import Unsupported
from tests.emulator.single import apply

WORDS = {16: np.uint16, 32: np.uint32, 64: np.uint64}

# instruction, width of d, widths of the sources
REFUSED = [
    ("add.rz.f16 %d, %a, %b;", 16, [16, 16]),
    ("add.sat.bf16 %d, %a, %b;", 16, [16, 16]),
    ("add.ftz.f64 %d, %a, %b;", 64, [64, 64]),
    ("add.f32.f16 %d, %a, %b;", 32, [16, 32]),
    ("add.sat.u32 %d, %a, %b;", 32, [32, 32]),
    ("sub.u16x2 %d, %a, %b;", 32, [32, 32]),
    ("fma.rn.oob.f16 %d, %a, %b, %c;", 16, [16, 16, 16]),
    ("fma.rn.relu.f32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("div.f32 %d, %a, %b;", 32, [32, 32]),
    ("sqrt.approx.f64 %d, %a;", 64, [64]),
    ("sin.f32 %d, %a;", 32, [32]),
    ("tanh.approx.f64 %d, %a;", 64, [64]),
    ("min.f32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("max.xorsign.f32 %d, %a, %b;", 32, [32, 32]),
    ("min.relu.u32 %d, %a, %b;", 32, [32, 32]),
    ("mul.s32 %d, %a, %b;", 32, [32, 32]),
    ("mul.wide.u64 %d, %a, %b;", 64, [64, 64]),
    ("mul24.wide.u32 %d, %a, %b;", 32, [32, 32]),
    ("mad.hi.sat.u32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("abs.u32 %d, %a;", 32, [32]),
    ("dp2a.u32.u32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("add.cc.u16 %d, %a, %b;", 16, [16, 16]),
    ("bfe.u16 %d, %a, %b, %c;", 16, [16, 32, 32]),
    ("popc.b16 %d, %a;", 32, [16]),
    ("bmsk.b32 %d, %a, %b;", 32, [32, 32]),
    ("and.u32 %d, %a, %b;", 32, [32, 32]),
    ("lop3.b32 %d, %a, %b, %c, 256;", 32, [32, 32, 32]),
    ("shl.u32 %d, %a, %b;", 32, [32, 32]),
    ("shf.l.b32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("prmt.b64 %d, %a, %b, %c;", 64, [64, 64, 64]),
    ("setp.lt.b32 %p, %a, %b; mov.b32 %d, 0;", 32, [32, 32]),
    ("setp.lo.s32 %p, %a, %b; mov.b32 %d, 0;", 32, [32, 32]),
    ("setp.ltu.u32 %p, %a, %b; mov.b32 %d, 0;", 32, [32, 32]),
    ("setp.eq.nand.u32 %p, %a, %b, %q; mov.b32 %d, 0;", 32, [32, 32]),
    ("set.eq.u32.f16x2 %d, %a, %b;", 32, [32, 32]),
    ("slct.u32.u32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("cvt.f16.f32 %d, %a;", 16, [32]),
    ("cvt.rn.s32.f32 %d, %a;", 32, [32]),
    ("cvt.rni.f16.f32 %d, %a;", 16, [32]),
    ("cvt.rna.f16.f32 %d, %a;", 16, [32]),
    ("cvt.rn.satfinite.f16.f64 %d, %a;", 16, [64]),
    ("cvt.rn.satfinite.e4m3x2.f32 %d, %a, %b;", 16, [32, 32]),
    ("cvt.rs.f16x2.f32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("cvt.u64.u32 %d, %a;", 32, [32]),
    ("cvt.pack.sat.u4.s32.b32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("mov.b32 %d, {%a, %b, %c};", 32, [16, 16, 16]),
    ("mov.u32 %d, %a;", 32, [64]),
    ("cvta.shared.u32 %d, %a;", 32, [32]),
    ("isspacep.const %p, %a; mov.b32 %d, 0;", 32, [64]),
    ("vadd.s32.s32.s32 %d, %a, %b;", 32, [32, 32]),
]


@pytest.mark.parametrize(("instruction", "result", "sources"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(instruction, result, sources):
    arrays = [np.zeros(1, WORDS[width]) for width in sources]
    opcode = instruction.split(";")[0]
    with pytest.raises(Unsupported, match=r"PTX line \d+: unsupported: .*") as refusal:
        apply(instruction, WORDS[result], *arrays)
    assert opcode in str(refusal.value)
