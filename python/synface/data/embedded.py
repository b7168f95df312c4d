"""Real faces without a download: 100 crops of Labeled Faces in the Wild, in varied styles."""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.check import check_least, check_memory
from ..common.rng import normals
from .formats.decode import DataError
from .formats.image_set import Faces
from .loading.augment import warp

FACES = 100  # of the file's 200 crops, the first 100 show faces
STYLES = 10  # numbers that `restyle` takes for each image
BLUR = 1.5 / 48.0  # the largest standard deviation, in sides of the image


def embedded_faces(
    images_per_identity: int = 20, size: int = 48, seed: int = 0, identities: int = FACES
) -> Faces:
    """Return the 100 face crops of LFW that scikit-image ships, each as one identity.

    Image 0 of each identity is the crop itself, enlarged from 25x25 pixels; the others vary its
    style: shift, rotation, scale, lighting (gain, bias and a gradient), blur and noise. Asking for
    more images per identity does not change the first ones.

    Args:
        images_per_identity: at least 1.
        size: height and width in pixels, at least 8.
        seed: random seed of the variation; the same seed gives the same images.
        identities: how many of the 100, in [2, 100].

    Returns:
        `Faces`, (identities * images_per_identity, size, size, 1) uint8, sorted by identity.

    Raises:
        ValueError: for an argument out of range.
        DataError: if scikit-image or its file is missing or not as expected.

    Source: Huang, Mattar, Lee, Learned-Miller, "Learning to Align from Scratch", NIPS 2012;
        scikit-image's `data/lfw_subset.npy`.
    """
    check_least("images_per_identity", images_per_identity, 1)
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    if not 2 <= identities <= FACES:
        raise ValueError(f"identities must lie in [2, {FACES}], got {identities}")
    # The uint8 images, and a dozen temporary float32 copies of those in one style.
    needed = identities * size**2 * (images_per_identity + 12 * 4)
    check_memory(f"{identities} faces of {size}x{size} pixels", needed)
    originals = enlarge(torch.from_numpy(lfw_crops()[:identities]), size)
    generator = torch.Generator().manual_seed(seed)
    varied = [originals]
    for _ in range(images_per_identity - 1):
        random = torch.rand(
            identities, STYLES, generator=generator, dtype=torch.float32, device="cpu"
        )
        noise = normals(originals.shape, generator)
        varied.append(restyle(originals, random, noise))
    images = torch.stack([to_bytes(x) for x in varied], 1)
    return Faces(
        images.view(-1, size, size, 1),
        torch.arange(identities, device="cpu").repeat_interleave(images_per_identity),
        [f"lfw{i:03d}" for i in range(identities)],
        f"scikit-image's LFW crops ({identities} people, varied)",
    )


def lfw_crops() -> np.ndarray:
    """Return the crops that scikit-image ships, (100, 25, 25) float64 in [0, 1].

    Raises:
        DataError: if scikit-image or its file is missing or not as expected.
    """
    hint = '; expected the file that scikit-image ships (pip install "synface-kernels[train]")'
    try:
        with (resources.files("skimage") / "data" / "lfw_subset.npy").open("rb") as file:
            crops = np.load(file, allow_pickle=False)
    except (ImportError, OSError, ValueError, EOFError) as error:
        raise DataError(f"the embedded faces cannot be read: {error}{hint}") from error
    if crops.shape != (200, 25, 25) or crops.dtype.kind != "f" or not _in_unit_range(crops):
        raise DataError(
            f"the embedded faces are {crops.dtype} {crops.shape}{hint}: "
            "floats in [0, 1] of shape (200, 25, 25)"
        )
    return crops[:FACES].astype(np.float64)


def _in_unit_range(x: np.ndarray) -> bool:
    return bool(np.isfinite(x).all() and x.min() >= 0.0 and x.max() <= 1.0)


def enlarge(crops: Tensor, size: int) -> Tensor:
    """Resize (B, H, W) to (B, 1, size, size) float32 in [0, 1], bicubic."""
    return F.interpolate(
        crops[:, None].float(),
        size=(size, size),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    ).clamp_(0.0, 1.0)


def to_bytes(x: Tensor) -> Tensor:
    """Convert [0, 1] to uint8, rounded."""
    return (x * 255.0).round_().to(torch.uint8)


def restyle(x: Tensor, random: Tensor, noise: Tensor) -> Tensor:
    """Vary the style of each image; no image depends on the others in the batch.

    Args:
        x: (B, 1, S, S) float32 in [0, 1].
        random: (B, 10) in [0, 1]: rotation (12 degrees either way), zoom (12 %), shift right and
            down (8 % of the side), blur (up to 1.5/48 of the side), slope of the light down and
            right (20 %), gain (35 %), bias (0.1), strength of the noise (up to 0.04). All but blur
            and noise change nothing at 0.5.
        noise: standard normal, of x's shape.

    Returns:
        Images of x's shape, in [0, 1].
    """
    side = x.shape[-1]
    signed = 2.0 * random - 1.0
    x = warp(
        x,
        angle=signed[:, 0] * math.radians(12.0),
        zoom=torch.exp(signed[:, 1] * math.log(1.12)),
        shift=signed[:, 2:4] * 0.08,
        flip=torch.zeros(len(x), dtype=torch.bool, device=x.device),
    )
    x = _blur(x, random[:, 4] * BLUR * side, radius=max(1, math.ceil(2.0 * BLUR * side)))
    # Light falls from a random direction.
    at = torch.linspace(-1.0, 1.0, side, dtype=x.dtype, device=x.device)
    slope = signed[:, 5:7, None, None] * 0.2
    gradient = slope[:, 0:1] * at[:, None] + slope[:, 1:2] * at
    gain = torch.exp(signed[:, 7] * math.log(1.35)).view(-1, 1, 1, 1)
    bias = (signed[:, 8] * 0.1).view(-1, 1, 1, 1)
    x = x * gain * (1.0 + gradient) + bias
    return (x + noise * (random[:, 9] * 0.04).view(-1, 1, 1, 1)).clamp_(0.0, 1.0)


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each (B, 1, H, W) image by a Gaussian of the given width in pixels.

    It sums shifted images, since a convolution's rounding would depend on the batch.
    """
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    taps = torch.softmax(-0.5 * (at / sigma.clamp_min(1e-3)[:, None]) ** 2, 1)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    for dim in (2, 3):
        shifted = padded.unfold(dim, x.shape[dim], 1).movedim(-1, dim + 1).unbind(dim)
        padded = sum(
            tap.view(-1, 1, 1, 1) * part for tap, part in zip(taps.T, shifted, strict=True)
        )
    return padded
