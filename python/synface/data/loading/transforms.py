"""A user's transforms of training images: torchvision's, albumentations', or any callable."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.check import describe
from ...common.imported import SPEC, imported
from ...common.rng import seeded_globally, standard_defaults
from ...common.toml import check_keys, read_toml, toml_text
from ..formats.decode import DataError

LIBRARIES = ("torchvision.transforms.v2", "albumentations")  # imported for any file
LEVEL = 1 / 255  # of float images


class Transforms:
    """Transforms of training images, applied in turn to each image of a batch by itself.

    A transform of torchvision.transforms.v2, or another callable, is called with a uint8 tensor
    (C, H, W); one of albumentations 2 as ``transform(image=array)["image"]`` with a uint8 array
    (H, W, C). Each returns an image of the same shape: uint8, or floating point in [0, 1], which is
    rounded to 8 bits.

    The global generators of torch, Python and NumPy are seeded for each batch and restored after
    it, and albumentations' transforms share generators that are seeded too. So a transform that
    draws from these alone is reproducible.

    Args:
        transforms: one, or several in order.
        names: the transforms' names in errors; by default their numbers and types.
        description: text that identifies the transforms in a checkpoint; by default the `repr` of
            each, without addresses.

    Raises:
        TypeError: for one that is not callable.
        ValueError: for one of an albumentations before 2.0.
    """

    def __init__(
        self,
        transforms: Callable[..., Any] | Sequence[Callable[..., Any]],
        names: Sequence[str] | None = None,
        description: str | None = None,
    ) -> None:
        if not callable(transforms) and not isinstance(transforms, Sequence):
            raise TypeError(
                f"transform must be callable, or a list of callables, got {describe(transforms)}"
            )
        self.transforms: list[Any] = [transforms] if callable(transforms) else list(transforms)
        self.names = names or [
            f"transform {i} ({getattr(each, '__name__', type(each).__name__)})"
            for i, each in enumerate(self.transforms, 1)
        ]
        if description is None:
            description = re.sub(r" at 0x[0-9a-fA-F]+", "", ", ".join(map(repr, self.transforms)))
        self.description = description
        for name, each in zip(self.names, self.transforms, strict=True):
            if not callable(each):
                raise TypeError(f"{name} must be callable, got {describe(each)}")
            if _of_albumentations(each) and not hasattr(each, "set_random_state"):
                raise ValueError(f"{name} needs albumentations 2.0 or later")

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """Transform images in place.

        Args:
            images: (B, H, W, C) uint8, on the CPU.
            seed: the seed of all random numbers of the batch.

        Returns:
            The same tensor.

        Raises:
            DataError: for a transform that fails, or whose result is no such image.
        """
        # Albumentations' own set_random_seed would have all parts of a Compose draw alike.
        generators = np.random.default_rng(seed), random.Random(str(seed))
        for each in self.transforms:
            if _of_albumentations(each):
                each.set_random_state(*generators)
        with seeded_globally(seed), standard_defaults(), torch.no_grad():
            for image in images:
                image.copy_(self._transformed(image))
        return images

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise the errors of a call for one gray image (H, W, C)."""
        self(torch.full((1, *shape), 128, dtype=torch.uint8, device="cpu"), 0)

    def _transformed(self, image: Tensor) -> Tensor:
        """Return one image (H, W, C) after all transforms."""
        for name, transform in zip(self.names, self.transforms, strict=True):
            by_array = _of_albumentations(transform)
            first = image.contiguous() if by_array else image.permute(2, 0, 1).contiguous()
            try:
                if by_array:
                    found = transform(image=first.numpy())["image"]
                    result = torch.from_numpy(np.ascontiguousarray(found))
                else:
                    result = transform(first)
            except Exception as error:
                raise DataError(f"{name} failed: {_in_one_line(error)}") from error
            result = _checked(name, result, tuple(first.shape))
            image = result if by_array else result.permute(1, 2, 0)
        return image


def _checked(name: str, result: object, shape: tuple[int, ...]) -> Tensor:
    """Return a transform's result as uint8; raise DataError unless it is an image of the shape."""
    expected = f"an image must remain a uint8 tensor {shape}, or floating point in [0, 1]"
    if not isinstance(result, Tensor):
        raise DataError(f"{name} returned {type(result).__name__}; {expected}")
    if tuple(result.shape) != shape:
        raise DataError(f"{name} returned {describe(result)}; {expected}")
    if result.is_floating_point():
        least, most = (float(each) for each in result.aminmax())
        if not (least >= -LEVEL / 2 and most <= 1 + LEVEL / 2):  # true for NaN
            raise DataError(
                f"{name} returned values from {least:g} to {most:g}; {expected}, and is normalized "
                "after the transforms"
            )
        return (result.float() / LEVEL).round().clamp(0, 255).to(torch.uint8)
    if result.dtype != torch.uint8:
        raise DataError(f"{name} returned {describe(result)}; {expected}")
    return result


def _of_albumentations(transform: object) -> bool:
    """Return whether a transform's class, or one that it derives from, is of albumentations."""
    modules = (each.__module__ for each in type(transform).__mro__)
    return any(module.split(".")[0] == "albumentations" for module in modules)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def read_transforms(file: Path, trusted: bool = True) -> Transforms:
    """Return the transforms that a TOML file lists.

    Each table ``[[transform]]`` names a class in its key ``use``, as ``module:Name``; the other
    keys are its arguments. A table with ``use`` among these is a transform, too.

    Args:
        trusted: import any module that the file names. Otherwise only classes of
            torchvision.transforms.v2 and albumentations are used.

    Raises:
        ValueError: naming the file and the transform, for a file that cannot be read, and a
            transform that cannot be imported or built with these arguments.
    """
    values = read_toml(file)
    check_keys(file, values, ["transform"])
    tables = values.get("transform")
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise ValueError(
            f"{file} must list transforms as tables [[transform]], "
            f'each with use = "{LIBRARIES[0]}:ColorJitter" or another class'
        )
    built = [
        _built(f"{file}: transform {i}", table, str(file) if not trusted else None)
        for i, table in enumerate(tables, 1)
    ]
    names = [f"{file}: transform {i} ({table['use']})" for i, table in enumerate(tables, 1)]
    try:
        return Transforms(built, names, toml_text(values).strip())
    except TypeError as error:  # a date
        raise ValueError(f"{file}: {error}") from error


def _built(where: str, table: dict[str, Any], untrusted: str | None) -> Callable[..., Any]:
    """Return the transform of a table; ``untrusted`` is the file's name if it is not trusted."""
    use = table.get("use")
    if not isinstance(use, str) or not SPEC.fullmatch(use):
        raise ValueError(
            f"{where}: use must be a class as module:Name, such as {LIBRARIES[0]}:ColorJitter, "
            f"got {use!r}"
        )
    where = f"{where} ({use})"
    arguments = {k: _argument(where, v, untrusted) for k, v in table.items() if k != "use"}
    found = _imported(where, use, untrusted)
    with warnings.catch_warnings():
        # Albumentations only warns of arguments that it does not know.
        warnings.filterwarnings("error", r"Argument\(s\) .* are not valid", UserWarning)
        try:
            built = found(**arguments)
        except Exception as error:
            raise ValueError(f"{where}: {_in_one_line(error)}") from error
    if not callable(built):
        raise ValueError(f"{where} must build a callable, got {describe(built)}")
    return built


def _argument(where: str, value: Any, untrusted: str | None) -> Any:
    if isinstance(value, list):
        return [_argument(where, each, untrusted) for each in value]
    if isinstance(value, dict) and "use" in value:
        return _built(f"{where}: transform inside", value, untrusted)
    return value


def _imported(where: str, use: str, untrusted: str | None) -> Callable[..., Any]:
    """Import what ``use`` names."""
    module, _, name = use.partition(":")
    if untrusted is not None and module not in LIBRARIES:
        raise ValueError(
            f"{where}: code that a run's folder names is not imported: give --transforms "
            f"{untrusted}, if you trust it"
        )
    if module.split(".")[0] == "albumentations":
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask a server
    found: Callable[..., Any] = imported(where, use)
    of_library = isinstance(found, type) and found.__module__.split(".")[0] == module.split(".")[0]
    if untrusted is not None and (not of_library or "." in name):
        raise ValueError(f"{where} is no class of {module}")
    return found
