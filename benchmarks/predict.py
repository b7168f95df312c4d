"""The time that follows from what a step launches: bytes by level, and the most of three times.

Ops run on meta tensors, their launches are recorded (`launches`), and each kernel's work is counted
(`costs`). On a device (`devices`) a launch takes the most of its compute, L2 and memory times, and
a gap; launches follow one another on one stream.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch

from . import compiled, costs
from .cases import Case
from .costs import Block, Work
from .devices import (
    FILL_CLOCKS,
    FLOAT32_LANES,
    FLOAT64_LANES,
    HOST_SECONDS,
    L2_BYTES,
    L2_SHARE,
    LAUNCH_GAP,
    SHARED_BYTES,
    SPECIAL_LANES,
    Device,
)
from .launches import Launch, Recorder, Region, as_on_gpu
from .peers import PEERS
from .workloads import WORKLOADS

PAGE_BYTES = 1 << 19
# The fewest classes of a tile, by which matrices of logits are known from those of targets.
LOGIT_COLUMNS = 128
# mma.sync, for fewer than 64 rows, reaches this share of wgmma's rate on Hopper (Luo et al., 2024,
# "Benchmarking and dissecting the NVIDIA Hopper GPU architecture", arXiv:2402.13499).
SYNCHRONOUS_SHARE = 0.62
_GENERATOR = torch.Generator("cpu")
# A step's launches and the work of each.
Works = list[tuple[Launch, Work]]


# ---- bytes by level ------------------------------------------------------------------------------


@dataclass
class _Page:
    """Bytes of a page that are in the cache, those of them to be written, and who wrote them."""

    size: float = 0.0
    dirty: float = 0.0
    writer: int = -1


class Cache:
    """A write-back L2 of least recently used pages; counts what each launch moves from memory.

    Attributes:
        written: by the number of a launch, the bytes that it wrote and that went to memory since.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held = capacity, 0.0
        self._pages: OrderedDict[tuple[int, int], _Page] = OrderedDict()
        self.written: dict[int, float] = {}

    def _touched(self, region: Region, nbytes: float) -> Iterator[tuple[_Page, float]]:
        """Yield a region's pages, as the latest used, with their shares of the bytes."""
        first = region.start // PAGE_BYTES
        last = (region.start + max(1, region.span) - 1) // PAGE_BYTES
        share = nbytes / (last - first + 1)
        for number in range(first, last + 1):
            page = self._pages.setdefault((region.storage, number), _Page())
            self._pages.move_to_end((region.storage, number))
            yield page, share
            self.held += max(0.0, share - page.size)
            page.size = max(page.size, share)
        while self.held > self.capacity:
            self._evict()

    def read(self, region: Region, nbytes: float) -> float:
        """Read bytes of a region; return how many of them come from memory."""
        return sum(max(0.0, share - page.size) for page, share in self._touched(region, nbytes))

    def write(self, region: Region, nbytes: float, launch: int) -> None:
        """Write bytes of a region; what they overwrite never goes to memory."""
        for page, share in self._touched(region, nbytes):
            if 2 * share >= page.dirty:
                page.writer = launch
            page.dirty = max(page.dirty, share)

    def _evict(self) -> None:
        _, page = self._pages.popitem(last=False)
        self.held -= page.size
        if page.dirty:
            self.written[page.writer] = self.written.get(page.writer, 0.0) + page.dirty

    def flush(self) -> None:
        """Write all that is not in memory yet."""
        while self._pages:
            self._evict()


# ---- time ----------------------------------------------------------------------------------------


def block_clocks(block: Block, device: Device, warps: int) -> float:
    """Return a multiprocessor's clocks for one m×n×k block, its first loads and epilogue aside.

    On tensor cores, per 32 bytes of k: m·n multiply-adds at the instruction's rate, or the shared
    memory's traffic if that takes longer: each group of 64 rows reads its rows and all columns of
    one accumulator, and both operands are written once. Else the float32 lanes' multiply-adds, and
    one load of 16 bytes per four operands of a thread's square of accumulators.
    """
    item = block.dtype.itemsize
    if not block.on_tensor_cores:
        side = math.sqrt(block.m * block.n / (32 * warps))
        loads = 1 + 1 / (2 * side)
        return loads * block.m * block.n * block.k / FLOAT32_LANES
    steps = block.k * item / 32
    flop = 2 * block.m * block.n * 32 / item
    clocks = flop / (device.tensor_flop * 2 / item)
    if block.m < 64:
        clocks /= SYNCHRONOUS_SHARE
    width = min(block.n, block.width)
    read = max(1.0, block.m / 64) * (block.n / width) * (min(64, block.m) + width) * 32
    written = (block.m + block.n) * 32
    return steps * max(clocks, (read + written) / SHARED_BYTES)


@dataclass(frozen=True)
class Entry:
    """One launch's line: what it moves and computes, and for how long."""

    name: str
    kernels: int
    flops: float
    memory: float
    l2: float
    compute_seconds: float
    memory_seconds: float
    l2_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        """The time on the device, with the gap to the next kernel."""
        longest = max(self.compute_seconds, self.memory_seconds, self.l2_seconds)
        return longest + self.kernels * LAUNCH_GAP

    @property
    def bound(self) -> str:
        """The resource that takes the longest."""
        times = {
            "compute": self.compute_seconds, "memory": self.memory_seconds, "L2": self.l2_seconds,
            "gap": self.kernels * LAUNCH_GAP,
        }  # fmt: skip
        return max(times, key=lambda name: times[name])


def clock_of(work: Work, device: Device) -> float:
    """Return the clock in Hz at which a device does such work."""
    busy = work.block is not None and work.block.on_tensor_cores
    return device.tensor_clock if busy else device.boost


def l2_seconds(work: Work, device: Device) -> float:
    """Return the time of all that goes through the L2."""
    return work.traffic / (L2_BYTES * clock_of(work, device))


def compute_seconds(work: Work, device: Device, warps: int, together: int) -> float:
    """Return the time on the busiest multiprocessor, if no bytes had to be waited for.

    Its programs follow one another, ``together`` at a time. One takes the clocks of its loads'
    latency, its GEMM and its epilogue one after the other; together they share the pipes.
    """
    each = 1 / max(1, work.programs)
    epilogue = each * max(
        work.vector / FLOAT32_LANES, work.special / SPECIAL_LANES, work.double / FLOAT64_LANES
    )
    gemm, fills = 0.0, 1.0
    if work.block is not None:
        fills = work.block.count
        gemm = fills * block_clocks(work.block, device, warps)
    alone = gemm + epilogue + (0.0 if work.pipelined else fills * FILL_CLOCKS)
    clocks = math.ceil(work.programs / device.multiprocessors) * max(
        gemm, epilogue, alone / together
    )
    return (clocks + (FILL_CLOCKS if work.pipelined else 0)) / clock_of(work, device)


def _entry(launch: Launch, work: Work, device: Device, memory: float) -> Entry:
    warps, together = 8, 1
    if launch.is_triton:
        warps = launch.options.get("num_warps", 4)
        together = compiled.programs_together(launch, device.capability)
        kind = "triton"
    else:
        kind = "mm" if launch.name in costs.GEMMS else "other"
    return Entry(
        name=launch.name,
        kernels=work.kernels,
        flops=work.flops,
        memory=memory,
        l2=work.traffic,
        compute_seconds=compute_seconds(work, device, warps, together),
        memory_seconds=memory / device.copy_rate,
        l2_seconds=l2_seconds(work, device),
        host_seconds=HOST_SECONDS[kind],
    )


def _work(launch: Launch, device: Device) -> Work:
    """Return a launch's work; of the ways that cuBLAS has, the fastest."""
    if launch.name not in costs.GEMMS:
        return costs.work_of(launch)

    def seconds(work: Work) -> float:
        time = max(compute_seconds(work, device, 8, 1), l2_seconds(work, device))
        return time + work.kernels * LAUNCH_GAP

    return min(costs.library_works(launch), key=seconds)


def entries(works: Works, device: Device) -> list[Entry]:
    """Return the lines of a step, whose launches follow one another."""
    l2 = Cache(device.l2_bytes * L2_SHARE)
    missed = []
    for number, (launch, work) in enumerate(works):
        missed.append(sum(l2.read(launch[name], size) for name, size in work.reads.items()))
        for name, size in work.writes.items():
            l2.write(launch[name], size, number)
    l2.flush()
    return [
        _entry(launch, work, device, missed[i] + l2.written.get(i, 0.0))
        for i, (launch, work) in enumerate(works)
    ]


def logit_bytes(works: Works, n: int, d: int) -> float:
    """Return the bytes through matrices that are N rows of many columns when first touched."""
    shapes: dict[int, tuple[int, ...]] = {}
    total = 0.0
    for launch, work in works:
        for name, size in [*work.reads.items(), *work.writes.items()]:
            region = launch[name]
            first = shapes.setdefault(region.storage, region.shape)
            if len(first) == 2 and first[0] == n and first[1] >= LOGIT_COLUMNS and first[1] != d:
                total += size
    return total


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A case's ledger: its lines, and for the margin softmax the bytes per logit.

    These go through matrices of logits, or of their gradients: N rows, a column for each class.
    """

    case: Case
    device: Device
    entries: list[Entry]
    bytes_per_logit: float | None

    @property
    def device_seconds(self) -> float:
        """The kernels' time, one after the other."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def host_seconds(self) -> float:
        """The host's time to launch them, which a captured graph takes once."""
        return sum(entry.host_seconds for entry in self.entries)

    @property
    def seconds(self) -> float:
        """The predicted time of a step: the device waits for the host, or the host for it."""
        return max(self.device_seconds, self.host_seconds)

    @property
    def floor_seconds(self) -> float:
        """The time of the case's least FLOP or least bytes at the device's ceilings."""
        rate = self.device.tensor_rate
        if self.case.gemm_dtype == torch.float32:  # no tensor cores, but for TF32
            rate = 2 * FLOAT32_LANES * self.device.multiprocessors * self.device.boost
        return max(self.case.flops / rate, self.case.bytes / self.device.copy_rate)

    def by_kernel(self) -> dict[str, list[Entry]]:
        """Return the lines of each kernel, in order of their first launch."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.name, []).append(entry)
        return found


@cache
def recorded(case: Case, capability: int, multiprocessors: int) -> Recorder:
    """Run our step of a case on meta tensors; return what it launched on such a GPU."""
    with mock.patch.object(torch, "Generator", return_value=_GENERATOR):  # none on meta tensors
        work = WORKLOADS[case.op](case, torch.device("meta"))
    step = PEERS[case.op][0].build(work)
    recorder = Recorder()
    with as_on_gpu(recorder, capability, multiprocessors, case.autocast):
        step()
    return recorder


@cache
def account(case: Case, device: Device) -> Account:
    """Return a case's ledger on a device."""
    launches = recorded(case, device.capability, device.multiprocessors).launches
    works = [(launch, _work(launch, device)) for launch in launches]
    per_logit, shape = None, case.shape
    if case.op == "margin_cross_entropy":
        count = shape["N"] * shape.get("S", shape["C"])
        per_logit = logit_bytes(works, shape["N"], shape["D"]) / count
    return Account(case, device, entries(works, device), per_logit)
