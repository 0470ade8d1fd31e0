"""The limits of the GPUs that the static report is written for.

Limits by compute capability: CUDA Programming Guide, "Technical Specifications per Compute Capability".
Allocation units and barriers: the toolkit's `cuda_occupancy.h`. Sizes and rates of a product: NVIDIA's data
sheets and architecture whitepapers, named at each row; sparse tensor rates are halved to dense ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. Memory in bytes, bandwidth in GB/s (10⁹), tensor rate in TFLOP/s (dense, fp32 accumulation).

    The fields with defaults are the same for every compute capability from 8.0 to 12.0.
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    barriers_per_sm: int | None  # hardware barriers that resident blocks share; None: never a limit
    shared_memory_per_sm: int
    l2_bytes: int
    global_memory_bytes: int
    memory_bandwidth: float
    bf16_tflops: float

    warp_size: int = 32
    max_threads_per_block: int = 1024
    registers_per_sm: int = 64 * KIB
    registers_per_block: int = 64 * KIB
    register_allocation_unit: int = 256  # registers, for one warp
    max_registers_per_thread: int = 255
    warp_allocation_granularity: int = 4  # an SM has four partitions, each with its share of the registers
    shared_memory_per_block: int = 48 * KIB  # without cudaFuncAttributeMaxDynamicSharedMemorySize
    shared_memory_reserved_per_block: int = KIB  # taken by the driver
    shared_memory_allocation_unit: int = 128

    @property
    def shared_memory_per_block_optin(self) -> int:
        """What one block may ask for at most, in bytes: all of an SM's but the part that is reserved."""
        return self.shared_memory_per_sm - self.shared_memory_reserved_per_block

    @property
    def max_warps_per_sm(self) -> int:
        return self.max_threads_per_sm // self.warp_size


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        # A100 data sheet (SXM, 80 GB); SMs and L2: "NVIDIA A100 Tensor Core GPU Architecture".
        "a100": Device(
            name="A100",
            compute_capability=(8, 0),
            multiprocessors=108,
            max_threads_per_sm=2048,
            max_blocks_per_sm=32,
            barriers_per_sm=None,
            shared_memory_per_sm=164 * KIB,
            l2_bytes=40 * MIB,
            global_memory_bytes=80 * GIB,
            memory_bandwidth=2039.0,
            bf16_tflops=312.0,
        ),
        # H100 data sheet (SXM); SMs and L2: "NVIDIA H100 Tensor Core GPU Architecture".
        "h100": Device(
            name="H100 SXM",
            compute_capability=(9, 0),
            multiprocessors=132,
            max_threads_per_sm=2048,
            max_blocks_per_sm=32,
            barriers_per_sm=64,
            shared_memory_per_sm=228 * KIB,
            l2_bytes=50 * MIB,
            global_memory_bytes=80 * GIB,
            memory_bandwidth=3350.0,
            bf16_tflops=989.5,
        ),
        # L4 data sheet (7424 cores, 128 to an SM); L2: "NVIDIA Ada GPU Architecture" (AD104).
        "l4": Device(
            name="L4",
            compute_capability=(8, 9),
            multiprocessors=58,
            max_threads_per_sm=1536,
            max_blocks_per_sm=24,
            barriers_per_sm=None,
            shared_memory_per_sm=100 * KIB,
            l2_bytes=48 * MIB,
            global_memory_bytes=24 * GIB,
            memory_bandwidth=300.0,
            bf16_tflops=121.0,
        ),
        # "NVIDIA Ada GPU Architecture", appendix A. GeForce tensor cores accumulate in fp32 at half rate.
        "rtx4090": Device(
            name="RTX 4090",
            compute_capability=(8, 9),
            multiprocessors=128,
            max_threads_per_sm=1536,
            max_blocks_per_sm=24,
            barriers_per_sm=None,
            shared_memory_per_sm=100 * KIB,
            l2_bytes=72 * MIB,
            global_memory_bytes=24 * GIB,
            memory_bandwidth=1008.0,
            bf16_tflops=165.2,
        ),
        # DGX B200 data sheet, an eighth of the system (1440 GB, 64 TB/s); tensor rate: HGX B200 data sheet;
        # L2: "Blackwell Tuning Guide". The number of SMs is in none of them: it is what the driver reports.
        "b200": Device(
            name="B200",
            compute_capability=(10, 0),
            multiprocessors=148,
            max_threads_per_sm=2048,
            max_blocks_per_sm=32,
            barriers_per_sm=64,
            shared_memory_per_sm=228 * KIB,
            l2_bytes=126 * MIB,
            global_memory_bytes=180 * GIB,
            memory_bandwidth=8000.0,
            bf16_tflops=2250.0,
        ),
        # "NVIDIA RTX Blackwell GPU Architecture", appendix A.
        "rtx5090": Device(
            name="RTX 5090",
            compute_capability=(12, 0),
            multiprocessors=170,
            max_threads_per_sm=1536,
            max_blocks_per_sm=24,
            barriers_per_sm=24,
            shared_memory_per_sm=100 * KIB,
            l2_bytes=96 * MIB,
            global_memory_bytes=32 * GIB,
            memory_bandwidth=1792.0,
            bf16_tflops=209.5,
        ),
    }
)


def device(name: str) -> Device:
    """The device of a short name such as "a100". Raises ValueError for a name that the table lacks."""
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name]
