"""Estimates of a training run: memory per rank, bytes exchanged, time per step, and remedies.

Memory is counted tensor by tensor, as this library allocates them. Time follows the roofline model:
each part takes as long as its arithmetic or its memory traffic, whichever is slower. The rates are
those of the data sheet, which give a lower bound, or measured ones.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..common.check import check_integer, check_number
from ..common.textfiles import parse_json, read_text
from ..models import PRESETS, SHORT
from ..training.config import option

MIB, GIB = 2**20, 2**30
WORKSPACE = 64 * MIB  # upper bound of margin_cross_entropy's, beside its results
IMAGE = (112, 112)
SHARE_FREE = 0.05  # of a device's memory, for the driver, its libraries and fragmentation
NAMES = ("float32", "bfloat16")
BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"none": 0, "sgd": 1, "adamw": 2}  # tensors as large as the parameters
DEPTHS = {short: PRESETS[name] for short, name in SHORT.items()}


@dataclass(frozen=True)
class Device:
    """Rates of a device.

    Attributes:
        memory: bytes. bandwidth: bytes/s of its memory.
        gemm: FLOP/s of dense GEMMs with float32 sums, by dtype.
        link: bytes/s to the other ranks in one direction. source: of these numbers.
    """

    memory: float
    bandwidth: float
    gemm: Mapping[str, float]
    link: float
    source: str


def _nvidia(
    memory: float, bandwidth: float, bf16: float, fp32: float, link: float, of: str
) -> Device:
    gemm = {"bfloat16": bf16 * 1e12, "float32": fp32 * 1e12}
    return Device(memory * 1e9, bandwidth * 1e9, gemm, link * 1e9, f"NVIDIA's data sheet: {of}")


DEVICES = {
    "a100": _nvidia(80, 2039, 312, 19.5, 300, "A100 80GB SXM"),
    "h100": _nvidia(80, 3350, 989, 67, 450, "H100 SXM"),
    "h200": _nvidia(141, 4800, 989, 67, 450, "H200 SXM"),
    "rtx4090": _nvidia(24, 1008, 165, 82.6, 32, "GeForce RTX 4090, PCIe 4.0 ×16"),
}


@dataclass(frozen=True)
class Settings:
    """The settings of a training run.

    Attributes:
        identities: C. dim: D, at most 2^20.
        gpus: P ranks, each with C/P classes and batch/P images.
        gpu_memory: bytes of each. device: a name of `DEVICES`.
        batch: images of one step, over all ranks.
        labels: per image (3 for mixed identities and domains).
        sample_rate: share of the classes that a step samples (Partial FC).
        fused_update: whether the backward pass steps the centers, which then have no gradient.
        centers: dtype of the class centers, their gradient and their optimizer's state.
        optimizer: of the centers: ``"sgd"`` (momentum), ``"adamw"`` or ``"none"``.
        backbone: a name of `DEPTHS`, at 112×112, or None to leave it out.
        precision: of the backbone's arithmetic and of the embeddings.
    """

    identities: int
    dim: int = option(512, "Dimension of the embeddings.", least=1)
    gpus: int = option(1, "Number of GPUs; the classes are split among them.", least=1)
    gpu_memory: float = 80e9
    batch: int = option(1024, "Images per step, on all GPUs together.")
    labels: int = option(1, "Labels per image; mixing gives up to 3.", least=1)
    sample_rate: float = option(1.0, "Share of the classes sampled in a step.", most=1.0)
    fused_update: bool = option(False, "Step the centers in the backward pass.")
    centers: str = option("float32", "Dtype of the class centers: float32 or bfloat16.")
    optimizer: str = option("sgd", "Optimizer of the class centers: sgd, adamw or none.")
    backbone: str | None = option("r50", "Backbone: r18, r34, r50 or r100 at 112x112, or none.")
    precision: str = option("bfloat16", "Precision of the backbone: bfloat16 or float32.")
    device: str = option("h100", "GPU: a100, h100, h200 or rtx4090.")

    def __post_init__(self) -> None:
        for name in ("identities", "gpus", "batch", "labels"):
            check_integer(name, getattr(self, name), 1, 2**63 - 1)
        check_integer("dim", self.dim, 1, 2**20)
        check_number("gpu_memory", self.gpu_memory, 1.0)
        check_number("sample_rate", self.sample_rate, 0.0, 1.0, above=True)
        for name, allowed in (
            ("centers", NAMES),
            ("precision", NAMES),
            ("optimizer", tuple(STATES)),
            ("device", tuple(DEVICES)),
            ("backbone", (None, *DEPTHS)),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed)
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.batch < self.gpus:
            raise ValueError(
                f"batch must hold an image for each of {self.gpus} gpus, got {self.batch}"
            )

    @property
    def classes(self) -> int:
        """Number of classes of the rank that holds most."""
        return math.ceil(self.identities / self.gpus)

    @property
    def sampled(self) -> int:
        """Number of sampled classes of a rank; in the worst case all positives are on it."""
        if self.sample_rate == 1:
            return self.classes
        least = math.ceil(self.classes * self.sample_rate)
        return min(self.classes, max(least, self.batch * self.labels))

    @property
    def images(self) -> int:
        """Number of images in a step of one rank."""
        return math.ceil(self.batch / self.gpus)


@dataclass(frozen=True)
class Seconds:
    """The duration of one part of a step, and its bound; ``measured``: from a measured rate."""

    seconds: float
    bound: Literal["arithmetic", "memory", "exchange"]
    measured: bool


@dataclass(frozen=True)
class Remedy:
    """A change, and the bytes that each rank then needs."""

    change: str
    bytes: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The plan of a training run, for the rank that holds most classes.

    Attributes:
        memory: bytes by part. exchange: bytes that a rank sends in a step, by part.
        time: `Seconds` by part. remedies: changes, if the run does not fit.
        rates: the source of the rates.
    """

    settings: Settings
    memory: dict[str, float]
    exchange: dict[str, float]
    time: dict[str, Seconds]
    remedies: list[Remedy]
    rates: str

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.memory.values())

    @property
    def available(self) -> float:
        """Bytes of the device, less the share that stays free."""
        return self.settings.gpu_memory * (1 - SHARE_FREE)

    @property
    def fits(self) -> bool:
        """True if the parts fit into the device's memory."""
        return self.total <= self.available

    @property
    def seconds(self) -> float:
        """Duration of a step, without overlap of its parts."""
        return sum(part.seconds for part in self.time.values())


@functools.cache
def _backbone(name: str, dim: int) -> tuple[int, float, float]:
    """Return the parameters, and per image the saved bytes and the FLOPs of both passes.

    They are counted by running the network on the meta device, which neither computes nor
    allocates.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..common.rng import standard_defaults
    from ..models.iresnet import IResNet

    with standard_defaults(), torch.device("meta"):
        network = IResNet(IMAGE, 3, (64, 128, 256, 512), DEPTHS[name], dim)
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def run(images: int) -> tuple[float, float]:
        saved: dict[int, int] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        counter = FlopCounterMode(display=False)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), counter:
            batch = torch.empty(images, 3, *IMAGE, dtype=torch.float32, device="meta")
            network(batch).sum().backward()
        return sum(saved.values()), counter.get_total_flops()

    (bytes2, flops2), (bytes4, flops4) = run(2), run(4)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, (bytes4 - bytes2) / 2, (flops4 - flops2) / 2


def memory(settings: Settings) -> dict[str, float]:
    """Return bytes by part, on the rank that holds most classes."""
    s, size = settings, BYTES[settings.centers]
    activation = BYTES[s.precision]
    parts: dict[str, float] = {"centers": s.classes * s.dim * size}
    if STATES[s.optimizer]:
        parts[f"centers' {s.optimizer} state"] = STATES[s.optimizer] * s.classes * s.dim * size
    if not s.fused_update:
        parts["centers' gradient"] = s.sampled * s.dim * size
    if s.sample_rate < 1:
        # the step after which each row is up to date; a bit per class; the sampled classes
        parts["sampling"] = 4 * s.classes + s.classes / 8 + 8 * s.sampled
    # all ranks' embeddings, their mean center and the gradient's partial sums in float32
    parts["embeddings"] = s.batch * s.dim * (2 * activation + 2 * 4)
    parts["loss workspace, at most"] = WORKSPACE
    if s.backbone:
        parameters, saved, _ = _backbone(s.backbone, s.dim)
        copies = 3 + (s.gpus > 1)  # weight, gradient, momentum; the buckets of DDP
        parts["backbone"] = 4 * parameters * copies
        parts["activations"] = saved * s.images * activation / 4
    return parts


def exchange(settings: Settings) -> dict[str, float]:
    """Return the bytes that a rank sends in one step, by part, with ring algorithms as NCCL's."""
    s = settings
    others = (s.gpus - 1) / s.gpus
    parts = {
        "embeddings, gathered": others * s.batch * s.dim * BYTES[s.precision],
        "labels, gathered": others * s.batch * s.labels * (8 + 8 * (s.labels > 1)),
        "sums and target cosines": 2 * others * s.batch * (2 + s.labels) * 8,
        "embeddings' gradient, reduced": others * s.batch * s.dim * 4,
    }
    if s.backbone:
        parameters, _, _ = _backbone(s.backbone, s.dim)
        parts["backbone's gradient, reduced"] = 2 * others * parameters * 4
    return parts


def _rates(settings: Settings, measured: Mapping[str, Any] | None) -> tuple[Device, bool, str]:
    device = DEVICES[settings.device]
    ceilings = (measured or {}).get("ceilings")
    if not isinstance(ceilings, Mapping):
        return device, False, device.source + " (peak rates; not measured)"
    # Only a bfloat16 GEMM is measured; float32 has the same share of its rate.
    factor = float(ceilings["product_tflop_per_second"]) * 1e12 / device.gemm["bfloat16"]
    device = replace(
        device,
        bandwidth=float(ceilings["copy_gigabyte_per_second"]) * 1e9,
        gemm={name: rate * factor for name, rate in device.gemm.items()},
    )
    name = (measured or {}).get("machine", {}).get("device", "this device")
    return device, True, f"a copy and a bfloat16 GEMM measured on {name}"


def time(
    settings: Settings, measured: Mapping[str, Any] | None = None
) -> tuple[dict[str, Seconds], str]:
    """Return the `Seconds` of a step's parts, and the source of the rates."""
    s = settings
    device, is_measured, source = _rates(s, measured)
    size = BYTES[s.centers]
    both = "float32" if "float32" in (s.centers, s.precision) else "bfloat16"

    def part(flops: float, moved: float, dtype: str = s.precision) -> Seconds:
        arithmetic, memory = flops / device.gemm[dtype], moved / device.bandwidth
        if arithmetic >= memory:
            return Seconds(arithmetic, "arithmetic", is_measured)
        return Seconds(memory, "memory", is_measured)

    rows = s.sampled * s.dim
    # four GEMMs, one of which recomputes the logits; centers read twice, gradient written
    passes = 2 if s.fused_update else 3
    parts = {"margin softmax": part(8.0 * s.batch * rows, passes * rows * size, both)}
    states = STATES[s.optimizer]
    if states:  # centers and states read and written, gradient read
        passes = 2 * (1 + states) + (0 if s.fused_update else 1)
        parts["centers' update"] = part(0, rows * size * passes)
    if s.backbone:
        parameters, saved, flops = _backbone(s.backbone, s.dim)
        moved = 3 * saved * s.images * BYTES[s.precision] / 4  # written, read, and its gradient
        parts["backbone"] = part(flops * s.images, moved)
        parts["backbone's update"] = part(0, 5 * 4 * parameters)
    if s.gpus > 1:
        sent = sum(exchange(s).values())
        parts["exchange"] = Seconds(sent / device.link, "exchange", False)
    return parts, source


def _remedies(settings: Settings) -> Iterator[Remedy]:
    def needs(changed: Settings) -> float:
        return sum(memory(changed).values())

    room = settings.gpu_memory * (1 - SHARE_FREE)

    def remedy(text: str, **changes: Any) -> Remedy:
        size = needs(replace(settings, **changes))
        return Remedy(text, size, size <= room)

    def least(fits: Callable[[int], bool], most: int) -> int | None:
        """Return the least number in [1, most] that fits, given that any larger one does."""
        found = bisect_left(range(1, most + 1), True, key=fits) + 1
        return found if found <= most else None

    if not settings.fused_update:
        yield remedy("no gradient of the centers: --fused-update", fused_update=True)
    if settings.centers == "float32":
        yield remedy(
            "centers in bfloat16, stochastically rounded: --centers bfloat16", centers="bfloat16"
        )
    thousandths = least(
        lambda k: needs(replace(settings, sample_rate=1 - k / 1000)) <= room, most=999
    )
    if thousandths is not None:
        rate = 1 - thousandths / 1000
        yield remedy(f"sample fewer classes: --sample-rate {rate:.3g}", sample_rate=rate)
    elif settings.sample_rate > 0.1:
        yield remedy("sample a tenth of the classes: --sample-rate 0.1", sample_rate=0.1)
    if settings.optimizer == "adamw":
        yield remedy("one optimizer state instead of two: --optimizer sgd", optimizer="sgd")
    if settings.optimizer != "none":
        yield remedy("no momentum for the centers: --optimizer none", optimizer="none")
    if settings.backbone and settings.images > 1:
        half = max(settings.gpus, settings.batch // 2)
        yield remedy(f"half the batch: --batch {half}", batch=half)
    gpus = least(lambda p: needs(replace(settings, gpus=p)) <= room, most=settings.batch)
    if gpus is not None:
        yield remedy(f"more GPUs: --gpus {gpus}", gpus=gpus)
    fewer = least(
        lambda k: needs(replace(settings, identities=settings.identities - k)) <= room,
        most=settings.identities - 1,
    )
    if fewer is not None:
        count = settings.identities - fewer
        yield remedy(f"fewer identities: --identities {count}", identities=count)


def plan(settings: Settings, measured: Mapping[str, Any] | None = None) -> Plan:
    """Estimate memory, exchange and time of a training step.

    Args:
        settings: of the run. measured: a result of ``make gpu-evidence`` (see `read_measured`),
            whose rates replace the data sheet's.

    Returns:
        A `Plan` of the rank that holds most classes, in bytes and seconds.

    Memory: the gradient exists for the sampled classes; 5 % of the device are reserved for the
    caches and fragmentation of a framework's allocator. Source: the formulas of
    `synface_kernels.margin_cross_entropy`, checked against measured peaks by the tests.
    """
    parts, source = time(settings, measured)
    result = Plan(settings, memory(settings), exchange(settings), parts, [], source)
    return result if result.fits else replace(result, remedies=list(_remedies(settings)))


def read_measured(path: Path) -> dict[str, Any]:
    """Return the content of a result file of ``make gpu-evidence``.

    Raises:
        ValueError: for another file, naming it and what is missing.
    """
    text = read_text(path)
    try:
        result = parse_json(text)
        for rate in ("copy_gigabyte_per_second", "product_tflop_per_second"):
            if not float(result["ceilings"][rate]) > 0:
                raise ValueError(f"its {rate} must be above 0, got {result['ceilings'][rate]}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a result of make gpu-evidence: {reason}") from error
    return dict(result)


SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def parse_count(name: str, text: str) -> int:
    """Return the whole number that is written as 100000, 100k, 10M or 1.5B."""
    return _parse(name, text.strip(), SUFFIXES, "a count such as 250000, 10M or 1.5B")


def parse_bytes(name: str, text: str) -> int:
    """Return the bytes that are written as 80GB (80e9), 24GiB (24·2³⁰) or 512MB."""
    units = {f"{k}b": v for k, v in SUFFIXES.items() if k != "b"}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    return _parse(name, text.strip(), units, "a size such as 80GB or 24GiB")


def _parse(name: str, text: str, units: Mapping[str, float], expected: str) -> int:
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text[len(number) :].lower()
    try:
        value = float(number.replace("_", "")) * (units[unit] if unit else 1)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {expected}, got {text!r}") from None
    if not math.isfinite(value) or value < 1 or value != round(value):
        raise ValueError(f"{name} must be {expected}, at least 1 and whole, got {text!r}")
    return round(value)
