"""Improved residual networks for face crops: a configurable one, and the published sizes."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import PRESETS

__all__ = ["IResNet", "PublishedIResNet"]
MAX_BLOCKS = 1000


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization that accepts a single value per channel.

    A single value has no variance: it is normalized by the running statistics, which it does not
    change. So a last batch of one image trains like any other.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


class _Norm1d(_AnyBatchNorm, nn.BatchNorm1d):
    pass


class _Norm2d(_AnyBatchNorm, nn.BatchNorm2d):
    pass


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose result on a CPU is in torch's channels_last order.

    All later layers keep that order, in which torch's take less time there than in its default one.
    A traced or exported network has the order of the device on which it was traced.
    """

    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _first(channels: int, widths: Sequence[int]) -> nn.Conv2d:
    """Return the first convolution of a network with stages of the given widths."""
    # Of other widths torch 2.13's backward convolution in that order writes outside of its memory.
    kind = nn.Conv2d if any(width % 16 for width in widths) else ChannelsLastConv2d
    return kind(channels, widths[0], 3, padding=1, bias=False)


def _residual(in_channels: int, channels: int, stride: int) -> list[nn.Module]:
    return [
        _Norm2d(in_channels),
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        _Norm2d(channels),
        nn.PReLU(channels),
        nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
        _Norm2d(channels),
    ]


def _projection(in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """Return the layers of a shortcut between different shapes; None for an identity."""
    if stride == 1 and in_channels == channels:
        return None
    convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
    return nn.Sequential(convolution, _Norm2d(channels))


def _pixels_after(
    image_size: tuple[int, int], widths: Sequence[int], depths: Sequence[int], embedding_size: int
) -> int:
    """Return the number of pixels after the last stage; raise ValueError for bad sizes."""
    if len(widths) != len(depths) or not widths or min(*widths, *depths, embedding_size) < 1:
        raise ValueError(
            "widths and depths must be equally many and, like embedding_size, positive, "
            f"got {list(widths)}, {list(depths)} and {embedding_size}"
        )
    if sum(depths) > MAX_BLOCKS:
        raise ValueError(f"depths must be at most {MAX_BLOCKS:,} together, got {sum(depths):,}")
    reduction = 2 ** len(widths)
    height, width = image_size
    if min(image_size) < reduction:
        raise ValueError(
            f"image_size must be at least {reduction} pixels a side for {len(widths)} stages, "
            f"got {height}×{width}"
        )
    return -(-height // reduction) * -(-width // reduction)


def _last_norm(embedding_size: int) -> _Norm1d:
    """Return the last layer, whose scale is fixed at 1: the loss normalizes the embeddings."""
    norm = _Norm1d(embedding_size)
    norm.weight.requires_grad_(False)
    return norm


class Block(nn.Module):
    """A residual block, BN-Conv-BN-PReLU-Conv-BN, as in ArcFace's improved ResNet."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_residual(in_channels, channels, stride))
        self.shortcut = _projection(in_channels, channels, stride) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class IResNet(nn.Module):
    """An IResNet from (N, C, H, W) images to (N, embedding_size) embeddings, not normalized.

    Args:
        image_size: (H, W) in pixels; each stage halves both.
        channels: C, 1 or 3.
        widths, depths: channels and residual blocks of each stage.
        embedding_size: dimension of the embeddings.
        dropout: probability of dropping a feature before the last layer.

    Raises:
        ValueError: for sizes that do not fit together.

    Source: Duta et al., "Improved Residual Networks" (ICPR 2020); Deng et al., "ArcFace".
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        channels: int = 1,
        widths: Sequence[int] = (16, 32, 64, 128),
        depths: Sequence[int] = (1, 1, 1, 1),
        embedding_size: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        pixels = _pixels_after(image_size, widths, depths, embedding_size)
        self.stem = nn.Sequential(
            _first(channels, widths),
            _Norm2d(widths[0]),
            nn.PReLU(widths[0]),
        )
        stages = []
        before = widths[0]
        for width, depth in zip(widths, depths, strict=True):
            for i in range(depth):
                stages.append(Block(before, width, stride=2 if i == 0 else 1))
                before = width
        self.stages = nn.Sequential(*stages)
        self.embed = nn.Sequential(
            _Norm2d(before),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(before * pixels, embedding_size),
        )
        self.norm = _last_norm(embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.embed(self.stages(self.stem(images))))


class PublishedBlock(nn.Module):
    """A `Block` whose layers are named as in insightface."""

    NAMES = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        for name, layer in zip(self.NAMES, _residual(in_channels, channels, stride), strict=True):
            self.add_module(name, layer)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for name in self.NAMES:
            out = getattr(self, name)(out)
        return out + (x if self.downsample is None else self.downsample(x))


class PublishedIResNet(nn.Sequential):
    """The IResNet of ArcFace's authors, with four stages of 64 to 512 channels.

    The names of its state dict are those of insightface's arcface_torch, so that its weights load.

    Args:
        depths: residual blocks of each stage.
        image_size, channels, embedding_size, dropout: as for `IResNet`.

    Raises:
        ValueError: for sizes that do not fit together.

    Source: Deng et al., "ArcFace" (CVPR 2019); insightface, recognition/arcface_torch.
    """

    WIDTHS = (64, 128, 256, 512)

    def __init__(
        self,
        depths: Sequence[int],
        image_size: tuple[int, int] = (112, 112),
        channels: int = 3,
        embedding_size: int = 512,
        dropout: float = 0.0,
    ) -> None:
        pixels = _pixels_after(image_size, self.WIDTHS, depths, embedding_size)
        before, stages = self.WIDTHS[0], {}
        for i, (width, depth) in enumerate(zip(self.WIDTHS, depths, strict=True), 1):
            first = PublishedBlock(before, width, stride=2)
            rest = (PublishedBlock(width, width, stride=1) for _ in range(1, depth))
            stages[f"layer{i}"], before = nn.Sequential(first, *rest), width
        super().__init__(
            OrderedDict(
                conv1=_first(channels, self.WIDTHS),
                bn1=_Norm2d(self.WIDTHS[0]),
                prelu=nn.PReLU(self.WIDTHS[0]),
                **stages,
                bn2=_Norm2d(before),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(dropout),
                fc=nn.Linear(before * pixels, embedding_size),
                features=_last_norm(embedding_size),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)


iresnet18, iresnet34, iresnet50, iresnet100 = (
    partial(PublishedIResNet, depths) for depths in PRESETS.values()
)


def insightface_names(names: Iterable[str]) -> dict[str, str]:
    """Return insightface's name for each parameter or buffer of an `IResNet`.

    Names of other networks, a `PublishedIResNet`'s among them, are returned as they are.
    """
    names = list(names)
    if "stem.0.weight" not in names:
        return {name: name for name in names}
    stage, block, place = 0, 0, {}
    for number in sorted({int(n.split(".")[1]) for n in names if re.match(r"stages\.\d+\.", n)}):
        begins = f"stages.{number}.shortcut.0.weight" in names  # only the first block projects
        stage, block = (stage + 1, 0) if begins else (stage, block + 1)
        place[str(number)] = f"layer{stage}.{block}"

    def renamed(name: str) -> str:
        part, _, rest = name.partition(".")
        index, _, last = rest.partition(".")
        if part == "stages" and index in place:
            kind, _, rest = last.partition(".")
            layer, _, last = rest.partition(".")
            if kind == "shortcut":
                return f"{place[index]}.downsample.{rest}"
            if kind == "body" and layer.isdecimal() and int(layer) < len(PublishedBlock.NAMES):
                return f"{place[index]}.{PublishedBlock.NAMES[int(layer)]}.{last}"
        top = {"stem.0": "conv1", "stem.1": "bn1", "stem.2": "prelu"}
        top |= {"embed.0": "bn2", "embed.3": "fc"}
        if f"{part}.{index}" in top:
            return f"{top[f'{part}.{index}']}.{last}"
        return f"features.{rest}" if part == "norm" else name

    return {name: renamed(name) for name in names}
