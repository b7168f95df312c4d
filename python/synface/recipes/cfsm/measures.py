"""Measures of a learned style space: what the direction of o does, and how near the target is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.extras import extra
from ...common.rng import generator as draws
from ...common.rng import normals

STATISTICS = ("noise", "sharpness", "brightness", "contrast")
WORDS = {  # for more and for less of a statistic; sharpness, a ratio of two others, has none
    "noise": ("noisier", "blurrier"),
    "brightness": ("brighter", "darker"),
    "contrast": ("more contrast", "less contrast"),
}
LITTLE = "little"
DIFFERS = 0.2  # a small effect (Cohen), in standard deviations of the source's images
# Least and most of each measure where generated images are called near their target.
BOUNDS = {"W1 ratio": (0.0, 0.7), "spread ratio": (0.5, 2.0)}
Draw = Callable[[Tensor, Tensor], Tensor]  # (images, o) to images, with the same noise each time


def high_pass(images: Tensor) -> Tensor:
    """Return floating-point (N, C, H, W) images less their 3×3 means."""
    return images - F.avg_pool2d(F.pad(images, (1,) * 4, mode="reflect"), 3, 1)


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Return noise, sharpness, brightness and contrast of (N, C, H, W) images, (N,) each.

    Brightness and contrast are the mean and the standard deviation of an image's numbers, noise is
    that of its 3×3 high-pass residual, and sharpness is noise divided by contrast.
    """
    noise = high_pass(images).flatten(1).std(1)
    contrast = images.flatten(1).std(1) + 1e-3
    brightness = images.flatten(1).mean(1)
    return dict(zip(STATISTICS, (noise, noise / contrast, brightness, contrast), strict=True))


def matching(generated: Tensor, target: Tensor, source: Tensor) -> dict[str, dict[str, float]]:
    """Compare the statistics of generated images with those of target images.

    Args:
        generated, target, source: (N, C, H, W) each, each of its own N, at least 2; floating point.

    Returns:
        By statistic: "W1", the Wasserstein distance, from generated to target images; "W1 of
        source" to target images; "W1 ratio" of the two; "spread ratio", the standard deviation of
        generated over that of target images, and "spread ratio of source"; "differs": how far
        source and target differ, W1 of source over the source's standard deviation.
    """
    with extra("train", "distances of distributions"):
        from scipy.stats import wasserstein_distance

    found = {}
    every = zip(*(image_statistics(x).items() for x in (generated, target, source)), strict=True)
    for (name, made), (_, wanted), (_, given) in every:
        own, before = (wasserstein_distance(x.cpu(), wanted.cpu()) for x in (made, given))
        spread = wanted.std().clamp_min(1e-9)
        found[name] = {
            "W1": own,
            "W1 of source": before,
            "W1 ratio": own / max(before, 1e-9),
            "spread ratio": (made.std() / spread).item(),
            "spread ratio of source": (given.std() / spread).item(),
            "differs": before / given.std().clamp_min(1e-9).item(),
        }
    return found


def controllability(
    draw: Draw, images: Tensor, styles: int, seed: int, strength: float = 3.0, directions: int = 32
) -> dict[str, float | None]:
    """Measure how much of an image's change depends on the direction of o, not on its strength.

    The change is draw(X, o) − draw(X, 0), at ‖o‖ = ``strength``.

    Args:
        draw: a generator whose noise map, if it has one, is the same for every o; otherwise its
            noise alone would make directions look different.
        images: (N, C, H, W), floating point, in [−1, 1]. styles: q.

    Memory: about (3·directions + 2·q)·N images.

    Returns:
        "axis cosine": mean cosine of the changes of an image along two axes, None if there is one
        axis. "opposite cosine": that along an axis and against it. "direction share": of the
        squared change along ``directions`` random directions, the share of its variance over them.
    """
    origin = draw(images, images.new_zeros(len(images), styles))

    def changes(o: Tensor) -> Tensor:
        drawn = [draw(images, each.expand(len(images), -1)) for each in o]
        return (torch.stack(drawn) - origin).flatten(2)

    along, against = (F.normalize(changes(o), dim=2) for o in _axes(images, styles, strength))
    cosines = torch.einsum("inp,jnp->ijn", along, along).mean(2)
    off = (cosines.sum() - cosines.trace()) / max(1, styles * (styles - 1))  # not the diagonal
    random = F.normalize(normals((directions, styles), draws(seed, "directions", 0)))
    moved = changes(random.to(images.device) * strength)
    variance = moved.var(0, unbiased=False).sum(1)
    share = variance / moved.square().sum(2).mean(0).clamp_min(1e-12)
    return {
        "axis cosine": off.item() if styles > 1 else None,
        "opposite cosine": (along * against).sum(2).mean().item(),
        "direction share": share.mean().item(),
    }


def _axes(images: Tensor, styles: int, strength: float) -> Tensor:
    """Return the styles along and against each axis, (2, q, q)."""
    axes = torch.eye(styles, dtype=images.dtype, device=images.device) * strength
    return torch.stack([axes, -axes])


def recovery(predicted: Tensor, o: Tensor) -> float:
    """Return R² of predicted styles, 1 − mean((predicted − o)²)/var(o); (N, q), floating point."""
    return 1.0 - ((predicted - o).square().mean() / o.var(unbiased=False)).item()


def axis_effects(
    draw: Draw, images: Tensor, styles: int, strength: float = 3.0
) -> dict[str, Tensor]:
    """Return how each statistic changes along each axis and against it.

    Args:
        draw: as for `controllability`.
        images: (N, C, H, W), floating point, in [−1, 1]. styles: q.

    Returns:
        By statistic: (2, q), the mean over the images of its value at ±``strength`` less that at
        o = 0, divided by the images' standard deviation in it.
    """
    before = image_statistics(draw(images, images.new_zeros(len(images), styles)))
    own = image_statistics(images)
    after = [
        image_statistics(draw(images, o.expand(len(images), -1)))
        for o in _axes(images, styles, strength).flatten(0, 1)
    ]
    return {
        name: torch.stack([(x[name] - before[name]).mean() / own[name].std() for x in after]).view(
            2, styles
        )
        for name in STATISTICS
    }


def words(effects: Mapping[str, Tensor]) -> list[list[str]]:
    """Return a word for what each axis changes most, along it and against it.

    Args:
        effects: of `axis_effects`.

    Returns:
        For each axis, two of the `WORDS`, or `LITTLE` for less than a small effect.
    """
    values = torch.stack([effects[name] for name in WORDS])  # (statistic, ±, axis)
    strongest = values.abs().argmax(0)
    names = list(WORDS.values())
    return [
        [
            LITTLE
            if values[which, side, axis].abs() < DIFFERS
            else names[which][0 if values[which, side, axis] > 0 else 1]
            for side, which in enumerate(strongest[:, axis].tolist())
        ]
        for axis in range(values.shape[2])
    ]
