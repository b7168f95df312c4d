"""Batches for the tests of mixers, and their mixtures by definition."""

import torch
from torch import Tensor

SIZE = (6, 7)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int, seed: int = 0, channels: int = 3) -> Tensor:
    shape = (batch, *SIZE, channels)
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


def flat(batch: int) -> Tensor:
    """Return images of which image i has the value i, so that pixels tell where they came from."""
    shape = (batch, *SIZE, 1)
    return torch.arange(batch, dtype=torch.uint8).view(-1, 1, 1, 1).expand(shape)


def expected(first: Tensor, second: Tensor, share: Tensor, mean: float, std: float) -> Tensor:
    """Return λ·X + (1 − λ)·X' of NHWC bytes, normalized, as NCHW in float64."""
    share = share.double().view(-1, 1, 1, 1)
    mixed = (share * first.double() + (1 - share) * second.double()) / 255
    return ((mixed - mean) / std).permute(0, 3, 1, 2)


def on_grid(weight: Tensor) -> Tensor:
    """Return the float64 share that a float32 weight rounds, on the grid of 21 values."""
    share = (weight.double() * 20).round() / 20
    assert (share - weight).abs().max() <= 2**-24
    return share


def assert_weights(weights: Tensor) -> None:
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    assert (weights.double().sum(1) == 1).all()


def boxes_of(mixed: Tensor, own: Tensor, other: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Top, bottom, left, right of what was pasted into each of `flat`'s images; None if nothing."""
    values = (mixed.double() * 255).round().long()[:, 0]
    found = []
    for image, i, j in zip(values, own.tolist(), other.tolist(), strict=True):
        inside = image == j
        assert (inside | (image == i)).all()
        if i == j or not inside.any():
            found.append(None)
            continue
        rows, columns = inside.any(1), inside.any(0)
        assert torch.equal(inside, rows[:, None] & columns)  # a rectangle
        y, x = rows.nonzero().flatten(), columns.nonzero().flatten()
        box = int(y[0]), int(y[-1]) + 1, int(x[0]), int(x[-1]) + 1
        assert inside.sum() == (box[1] - box[0]) * (box[3] - box[2])
        found.append(box)
    return found


def kept(box: tuple[int, int, int, int]) -> float:
    pixels = SIZE[0] * SIZE[1]
    return (pixels - (box[1] - box[0]) * (box[3] - box[2])) / pixels
