"""Additions to CFSM's first stage, so that styles differ and match the target.

None of them is in the paper; ``fidelity = "paper"`` switches all of them off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .measures import high_pass


def wake(mlp: nn.Sequential, latent: Tensor, std: float) -> None:
    """Initialize a style MLP so that its outputs for latent vectors have a standard deviation.

    As torch initializes it, the outputs hardly depend on z. All biases become zero.

    Args:
        latent: (N, d) of z, floating point. std: over all outputs.
    """
    layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        layers[-1].weight.mul_(std / mlp(latent).std())


class StylePredictor(nn.Module):
    """Network that predicts o from a generated image and its change, as InfoGAN's Q does.

    Args:
        channels: of the images. styles: q. width: channels of the first layer.

    Source: Chen et al., "InfoGAN: Interpretable Representation Learning by Information Maximizing
        Generative Adversarial Nets", NIPS 2016.
    """

    def __init__(self, channels: int, styles: int, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels *= 2
        for _ in range(3):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, width = width, 2 * width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.last = nn.Linear(16 * channels, styles)

    def forward(self, drawn: Tensor, images: Tensor) -> Tensor:
        """Map two (N, C, H, W) to (N, q)."""
        return self.last(self.layers(torch.cat([drawn, drawn - images], 1)))


def smooth_fields(
    height: int, width: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the count² − 1 smoothest fields of the two-dimensional cosine transform but the mean.

    Returns:
        (count² − 1, height, width) float32, of amplitude 1, on ``device``.
    """

    def waves(side: int) -> Tensor:
        at = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side
        times = torch.arange(count, dtype=torch.float32, device=device)
        return torch.cos(math.pi * times[:, None] * at)

    return (waves(height)[:, None, :, None] * waves(width)[:, None, :]).flatten(0, 1)[1:]


def texture_statistics(images: Tensor, bands: int = 3) -> Tensor:
    """Return the statistics of each channel of each image that target images are matched in.

    They are the mean and the standard deviation, and the log standard deviations of the
    differences of neighboring pixels in four directions (which tell noise from stripes), and of the
    bands of a Laplacian pyramid.

    Args:
        images: (N, C, H, W), floating point, with sides of 2^bands pixels or more.

    Returns:
        (N, C·(bands + 6)), of the images' dtype.
    """
    x, y = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    found = [images.mean((2, 3)), _log_std(images).exp()]
    found += [_log_std(difference) for difference in (x, y, falling, rising)]
    for _ in range(bands):
        half = F.avg_pool2d(images, 2)
        whole = F.interpolate(half, images.shape[2:], mode="bilinear", align_corners=False)
        found.append(_log_std(images - whole))
        images = half
    return torch.cat(found, 1)


def _log_std(images: Tensor) -> Tensor:
    return 0.5 * (images.var((2, 3)) + 1e-4).log()


def energy_distance(a: Tensor, b: Tensor, within_b: Tensor | None = None) -> Tensor:
    """Estimate the squared energy distance of two distributions, without bias, from samples.

    It is 2·E|A − B| − E|A − A'| − E|B − B'|, summed over the columns, and zero for equal
    distributions; an estimate may be negative.

    Args:
        a, b: (N, K) and (M, K) of one floating-point dtype, each with two rows or more; with one,
            the result is not a number.
        within_b: `mean_distance` of b, if it is known already.

    Memory: all N·(N + M)·K differences, and M²·K without ``within_b``.

    Source: Székely and Rizzo, "Energy statistics: A class of statistics based on distances", 2013.
    """
    between = (a[:, None] - b).abs().sum() / (len(a) * len(b))
    return 2.0 * between - mean_distance(a) - (mean_distance(b) if within_b is None else within_b)


def mean_distance(samples: Tensor) -> Tensor:
    """Return the mean of Σ|x − y| over the columns, for every two different rows of (N, K)."""
    count = len(samples)
    return (samples[:, None] - samples).abs().sum() / (count * (count - 1))


class StatisticsLoss:
    """Energy distance of the `texture_statistics` of images from those of target images.

    Each statistic is divided by its standard deviation over the target images.

    Args:
        target: (M, C, H, W), floating point, two images or more.

    Raises:
        ValueError: for fewer images.

    Memory: see `energy_distance`; M²·K numbers once.
    """

    def __init__(self, target: Tensor) -> None:
        if len(target) < 2:
            raise ValueError(f"target must have two images or more, got {len(target)}")
        wanted = texture_statistics(target)
        self.scale = wanted.std(0).clamp_min(1e-3)
        self.wanted = wanted / self.scale
        self.within = mean_distance(self.wanted)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the loss of (N, C, H, W) images, N at least 2."""
        found = texture_statistics(images) / self.scale
        return energy_distance(found, self.wanted, self.within)


def with_residuals(images: Tensor) -> Tensor:
    """Return images with their high-pass residuals as further channels."""
    return torch.cat([images, high_pass(images)], 1)
