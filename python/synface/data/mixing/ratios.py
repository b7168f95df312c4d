"""Distributions of mixing shares, and the mixers' random draws.

All numbers are drawn from the `torch.Generator` that a call is given (None: the CPU's global one),
on that generator's device, whatever torch's default device and dtype are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from ...common.check import check_generator, check_integer, check_number


class Ratio(Protocol):
    """A distribution of shares in [0, 1]."""

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Return (count,) float64 independent draws, on the generator's device (None: CPU)."""
        ...


@dataclass(frozen=True)
class Grid:
    """The uniform distribution over ``steps`` equidistant values from 0 to 1.

    By default these are SynFace's 0, 0.05, …, 1.

    Raises:
        TypeError, ValueError: unless ``steps`` is an integer ≥ 2.
    """

    steps: int = 21

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 2)

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        check_integer("count", count, 0)
        drawn = torch.randint(
            self.steps, (count,), generator=generator, device=device_of(generator)
        )
        return drawn.double() / (self.steps - 1)


SYNFACE_GRID = Grid()


@dataclass(frozen=True)
class Beta:
    """The distribution Beta(a, b); b defaults to a.

    Raises:
        TypeError, ValueError: unless a and b are numbers in [1e-300, 1e300].

    Source: Zhang et al., "mixup", ICLR 2018, takes Beta(a, a).
    """

    a: float
    b: float | None = None

    def __post_init__(self) -> None:
        check_number("a", self.a, 1e-300, 1e300)
        if self.b is not None:
            check_number("b", self.b, 1e-300, 1e300)

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        check_integer("count", count, 0)
        b = self.a if self.b is None else self.b
        shape = torch.tensor([[self.a], [b]], dtype=torch.float64, device="cpu").expand(2, count)
        shape = send(shape, device_of(generator))
        # Beta is G_a/(G_a + G_b) of two gamma variates, and G_a = G_(a+1)·U^(1/a): in logarithms,
        # because for small a both may be too small for a float.
        gamma = torch._standard_gamma(shape + 1, generator=generator)
        base = 1 - uniform((2, count), generator)  # never 0
        first, second = gamma.log() + base.log() / shape
        return torch.sigmoid(first - second)


@dataclass(frozen=True)
class Constant:
    """The distribution of one value.

    Raises:
        TypeError, ValueError: unless ``value`` is a number in [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        check_number("value", self.value, 0, 1)

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        check_integer("count", count, 0)
        return torch.full(
            (count,), float(self.value), dtype=torch.float64, device=device_of(generator)
        )


# ---- draws ---------------------------------------------------------------------------------------


def device_of(generator: Generator | None) -> torch.device:
    check_generator(generator)
    return torch.device("cpu") if generator is None else generator.device


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for a GPU; its memory may still be read."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def uniform(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Return uniform draws, float64 in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device_of(generator))


def permutation(count: int, generator: Generator | None) -> Tensor:
    return torch.randperm(count, generator=generator, device=device_of(generator))
