"""Networks of timm as backbones: ``synface train --backbone synface.models.timm:resnet18``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..common.extras import extra


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """Return a function that builds timm's network of that name, without trained parameters.

    Names are without the tag of pretrained parameters. The function raises ValueError for sizes of
    images that the network does not take.

    Raises:
        AttributeError: if timm has no such network.
        ImportError: if timm is not installed.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("timm", f"the backbone {name}"):
        import timm
    if not timm.is_model(name):
        raise AttributeError(f"timm {timm.__version__} has no network {name!r}")
    return partial(_create, name)


def _create(
    name: str, *, image_size: tuple[int, int], channels: int, embedding_size: int
) -> nn.Module:
    import timm

    height, width = image_size
    options: dict[str, Any] = {"num_classes": embedding_size, "in_chans": channels}
    known = timm.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size:  # others take any size, and no option
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # its networks raise what they like for sizes that do not fit
        raise ValueError(
            f"timm cannot build {name} for images of {height}x{width}: {error}"
        ) from error
