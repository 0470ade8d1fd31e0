"""A call of every kind of kernel, for compute-sanitizer: python -m tests.gpu.calls."""

from __future__ import annotations

import torch

import fused_lora
from tests.operands import DTYPES, F64, forward_and_backward, operands


def main() -> None:
    # Operands are made on the CPU, so that the kernels under test are almost all there is to look at.
    with fused_lora.use_path("fused"):
        for dtype, adapter_dtype in DTYPES:
            if dtype == F64:
                continue
            for rows, in_features, out_features, rank in [
                (3, 40, 24, 5),
                (24, 64, 96, 8),
                (300, 192, 136, 16),
            ]:
                given = operands(
                    (rows,), in_features, out_features, rank, dtype, adapter_dtype, dropout_p=0.3
                )
                forward_and_backward(fused_lora.lora_linear, given.to("cuda"))
        fused_lora.dropout_mask(torch.tensor([5]).to("cuda"), 30, 41, 0.3)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
