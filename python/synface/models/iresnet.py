"""A residual network for face crops, after IResNet, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

MAX_BLOCKS = 1000


class _TakesOneValue(nn.modules.batchnorm._BatchNorm):
    """Batch normalization that takes a single value per channel.

    One value has no variance: it is normalized by the running statistics, which stay as they are.
    So a last batch of one image trains like any other.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


class _Norm1d(_TakesOneValue, nn.BatchNorm1d):
    pass


class _Norm2d(_TakesOneValue, nn.BatchNorm2d):
    pass


class Block(nn.Module):
    """BN-Conv-BN-PReLU-Conv-BN and a shortcut, as in ArcFace's improved ResNet."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _Norm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            _Norm2d(channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            _Norm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), _Norm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class IResNet(nn.Module):
    """(N, C, H, W) images to (N, embedding_size) embeddings, not normalized.

    Args:
        image_size: (H, W) in pixels; each stage halves it.
        channels: of the images, 1 or 3.
        widths, depths: channels and blocks of each stage.
        embedding_size: D.
        dropout: share of features dropped before the last layer.

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
        if len(widths) != len(depths) or not widths or min(*widths, *depths, embedding_size) < 1:
            raise ValueError(
                "widths and depths must be equally many and, like embedding_size, positive, "
                f"got {list(widths)}, {list(depths)} and {embedding_size}"
            )
        if sum(depths) > MAX_BLOCKS:
            raise ValueError(f"depths must be at most {MAX_BLOCKS:,} together, got {sum(depths):,}")
        reduction = 2 ** len(widths)
        if min(image_size) < reduction:
            raise ValueError(
                f"image_size must be at least {reduction} pixels a side for {len(widths)} stages, "
                f"got {image_size[0]}×{image_size[1]}"
            )
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
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
        height, width = image_size
        for _ in widths:
            height, width = -(-height // 2), -(-width // 2)
        self.embed = nn.Sequential(
            _Norm2d(before),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(before * height * width, embedding_size),
        )
        self.norm = _Norm1d(embedding_size)
        nn.init.ones_(self.norm.weight)
        self.norm.weight.requires_grad_(False)  # the loss is blind to a common scale

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.embed(self.stages(self.stem(images))))
