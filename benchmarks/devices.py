"""Rates of GPUs: NVIDIA's data sheets, measured ceilings, and assumptions beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MEBI = 1 << 20


@dataclass(frozen=True)
class Device:
    """A GPU as the ledger sees it.

    Attributes:
        name, capability: "H100", 90.
        multiprocessors, l2_bytes, memory_rate: from the data sheet; bytes a second.
        boost: the clock in Hz that the data sheet's rates are given at.
        tensor_flop: dense 16-bit FLOP per clock and multiprocessor; TF32 has half.
        tensor_rate: FLOP a second of the best sustained 16-bit GEMM, which sets the clock under
            tensor cores' load.
        copy_rate: bytes a second of a copy.
        measured: whether the last two were measured.
    """

    name: str
    capability: int
    multiprocessors: int
    l2_bytes: int
    memory_rate: float
    boost: float
    tensor_flop: int
    tensor_rate: float
    copy_rate: float
    measured: bool = False

    @property
    def tensor_clock(self) -> float:
        """The clock in Hz at which tensor cores would give `tensor_rate` if never idle."""
        return self.tensor_rate / (self.tensor_flop * self.multiprocessors)


# Lanes of a multiprocessor, that is results per clock (CUDA C++ Programming Guide, table of
# arithmetic throughput, compute capability 9.0), and bytes that its shared memory moves per clock.
FLOAT32_LANES, FLOAT64_LANES, SPECIAL_LANES, SHARED_BYTES = 128, 64, 16, 128
# A multiprocessor's registers, warps, and shared memory (the same guide); a block's own overhead.
REGISTERS, WARPS, SHARED, SHARED_RESERVED = 65536, 64, 228 * 1024, 1024

# Assumptions, each to be replaced by a measurement.
# A large cuBLAS GEMM in bfloat16 sustains 790 of the data sheet's 989 TFLOP/s: power limits clocks.
SUSTAINED_TENSOR = 790 / 989
# A copy reaches nine tenths of the memory's rate.
SUSTAINED_COPY = 0.9
# Bytes per clock out of the L2 to all multiprocessors: the A100's, of its white paper; that of the
# H100 is not published.
L2_BYTES = 5120
# The L2 is in two halves, and lines that multiprocessors of both read may be held twice.
L2_SHARE = 0.5
# Clocks until a program's first operands have come from L2 or memory, and its pipeline is full.
FILL_CLOCKS = 1000
# Seconds between the end of a kernel and the start of the next on the same stream.
LAUNCH_GAP = 1.5e-6
# Seconds of the host per Triton kernel, per GEMM, and per other operator of torch.
HOST_SECONDS = {"triton": 13e-6, "mm": 7e-6, "other": 5e-6}


def _hopper(name: str, memory_rate: float) -> Device:
    # H100 SXM and H200 SXM: 132 multiprocessors, 989.4 TFLOP/s dense in bfloat16 at 1,830 MHz,
    # which is 4,096 FLOP per clock and multiprocessor; float32 67 TFLOP/s at 1,980 MHz.
    return Device(
        name=name, capability=90, multiprocessors=132, l2_bytes=50 * MEBI,
        memory_rate=memory_rate, boost=1.98e9, tensor_flop=4096,
        tensor_rate=989e12 * SUSTAINED_TENSOR, copy_rate=memory_rate * SUSTAINED_COPY,
    )  # fmt: skip


# NVIDIA H100 Tensor Core GPU data sheet (SXM5, HBM3) and NVIDIA H200 data sheet (SXM, HBM3e).
DEVICES = {device.name: device for device in (_hopper("H100", 3.35e12), _hopper("H200", 4.8e12))}


def device(name: str) -> Device:
    """Return a device by its name.

    Raises:
        ValueError: for a name that is not in `DEVICES`.
    """
    if name not in DEVICES:
        raise ValueError(
            f"device must be one of {list(DEVICES)}, got {name!r}: add its data sheet to "
            "benchmarks/devices.py"
        )
    return DEVICES[name]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return, by a device's name, the result of a measurement on such a GPU, an SXM module."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        words = result.get("machine", {}).get("device", "").split()
        if not {"PCIe", "NVL"} & set(words):
            found |= {name: result for name in DEVICES if name in words}
    return found


def with_ceilings(device: Device, result: dict[str, Any] | None) -> Device:
    """Return a device with the ceilings of such a GPU's result instead of the assumed ones."""
    ceilings = (result or {}).get("ceilings", {})
    if not {"copy_gigabyte_per_second", "product_tflop_per_second"} <= ceilings.keys():
        return device
    return replace(
        device,
        copy_rate=ceilings["copy_gigabyte_per_second"] * 1e9,
        tensor_rate=ceilings["product_tflop_per_second"] * 1e12,
        measured=True,
    )
