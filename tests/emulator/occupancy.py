"""How many blocks of a kernel one SM holds at a time.

The rule is that of the toolkit's `cuda_occupancy.h`, for compute capability 8.0 and later and with all of the
SM's shared memory available.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.emulator.devices import Device


@dataclass(frozen=True)
class Occupancy:
    """What one SM holds: blocks, their warps, and these as a fraction of the warps that it could hold.

    `limited_by` names every limit that allows no more blocks: "blocks", "warps", "registers", "shared memory"
    or "barriers". Zero blocks: the kernel cannot be launched.
    """

    blocks: int
    warps: int
    fraction: float
    limited_by: tuple[str, ...]


def occupancy(
    device: Device, threads: int, registers: int, shared_bytes: int, *, barriers: int = 0
) -> Occupancy:
    """Occupancy of a kernel on a device.

    threads: threads per block; registers: registers per thread; shared_bytes: static plus dynamic shared
    memory per block, in bytes (past 48 KiB the launcher must opt in); barriers: named barriers per block.
    Raises ValueError for an argument that no kernel has; a kernel too large for the device has zero blocks.
    """
    for argument, value, least in [
        ("threads", threads, 1),
        ("registers", registers, 1),
        ("shared_bytes", shared_bytes, 0),
        ("barriers", barriers, 0),
    ]:
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    warps = _divide_up(threads, device.warp_size)
    limits = {
        "blocks": device.max_blocks_per_sm,
        "warps": device.max_warps_per_sm // warps if threads <= device.max_threads_per_block else 0,
        "registers": _blocks_by_registers(device, warps, registers),
        "shared memory": _blocks_by_shared_memory(device, shared_bytes),
    }
    if device.barriers_per_sm is not None and barriers > 0:
        limits["barriers"] = device.barriers_per_sm // barriers
    blocks = min(limits.values())
    return Occupancy(
        blocks=blocks,
        warps=blocks * warps,
        fraction=blocks * warps / device.max_warps_per_sm,
        limited_by=tuple(name for name, limit in limits.items() if limit == blocks),
    )


def _blocks_by_registers(device: Device, warps: int, registers: int) -> int:
    """Each warp lives in one partition of the SM and takes its registers from there.

    A block may have as many registers as an SM has, so that limit is never met first.
    """
    if registers > device.max_registers_per_thread:
        return 0
    partitions = device.warp_allocation_granularity
    per_warp = _round_up(registers * device.warp_size, device.register_allocation_unit)
    return device.registers_per_sm // partitions // per_warp * partitions // warps


def _blocks_by_shared_memory(device: Device, shared_bytes: int) -> int:
    per_block = shared_bytes + device.shared_memory_reserved_per_block
    return device.shared_memory_per_sm // _round_up(per_block, device.shared_memory_allocation_unit)


def _divide_up(value: int, unit: int) -> int:
    return -(-value // unit)


def _round_up(value: int, unit: int) -> int:
    return _divide_up(value, unit) * unit
