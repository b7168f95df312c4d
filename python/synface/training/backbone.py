"""The backbone of a configuration: an IResNet, or the result of a user's function.

A function is imported only where the user names it. What a checkpoint or a run's folder names
could be anyone's code, so nothing imports it unasked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..common.check import check_memory, describe
from ..common.imported import imported
from ..common.modes import evaluating
from ..common.rng import standard_defaults
from ..models import PRESETS
from ..models.iresnet import IResNet, PublishedIResNet
from .config import BUILT_IN, MODULE, TrainConfig


def with_backbone(config: TrainConfig, backbone: nn.Module | None) -> TrainConfig:
    """Return the configuration of a run whose backbone is replaced by a module, if one is given.

    Raises:
        ValueError: for a configuration that needs a module, which is not given.
    """
    if backbone is None and config.backbone == MODULE:
        raise ValueError(
            f"config.backbone is {MODULE!r}: give the module, as train(..., backbone=module)"
        )
    if backbone is None or ":" in config.backbone:  # a module of that function may be given
        return config
    return replace(config, backbone=MODULE)


def build_backbone(config: TrainConfig, image_shape: tuple[int, ...]) -> nn.Module:
    """Return the backbone of a configuration for (H, W, C) images.

    Raises:
        ValueError: if it cannot be built, or its parameters exceed the free memory.
    """
    check_network(config, image_shape)
    with standard_defaults():
        return _build(config, image_shape)


def check_network(config: TrainConfig, image_shape: tuple[int, ...]) -> nn.Module | None:
    """Return the backbone for (H, W, C) images on the device "meta"; raises as `build_backbone`.

    A user's function is imported but not called; None is returned for it, and for a module passed
    to `train`.
    """
    if config.backbone not in BUILT_IN:
        if config.backbone != MODULE:
            _function(config.backbone)
        return None
    network = shapes_of(config, image_shape)
    height, width, _ = image_shape
    what = f"{config.backbone} with"
    if config.backbone == "iresnet":
        what = f"a network of widths {list(config.widths)}, depths {list(config.depths)} and"
    check_memory(
        f"{what} embedding_size {config.embedding_size} for images of {height}×{width}",
        sum(4 * each.numel() for each in network.parameters()),
    )
    return network


def shapes_of(config: TrainConfig, image_shape: tuple[int, ...]) -> nn.Module:
    """Return a built-in backbone on the device "meta": shapes to compare with those of a file.

    Raises:
        ValueError: if it cannot be built on any machine.
    """
    with standard_defaults(), torch.device("meta"):
        try:
            return _build(config, image_shape)
        except RuntimeError as error:  # sizes over 2^63
            raise ValueError(f"the backbone cannot be built: {error}") from error


def check_embeddings(
    backbone: nn.Module, image_shape: tuple[int, ...], embedding_size: int
) -> None:
    """Raise ValueError unless a module can be trained as a backbone for (H, W, C) images.

    The check embeds two images, in evaluation mode.
    """
    for name, value in backbone.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the backbone's state_dict() must only hold tensors, got {describe(value)} as "
                f"{name}"
            )
    height, width, channels = image_shape
    device = next((each.device for each in backbone.parameters()), torch.device("cpu"))
    images = torch.zeros(2, channels, height, width, dtype=torch.float32, device=device)
    try:
        with torch.no_grad(), evaluating(backbone):
            found = backbone(images)
    except RuntimeError as error:
        raise ValueError(
            f"the backbone cannot embed images of shape {tuple(images.shape)}: {error}"
        ) from error
    if not isinstance(found, Tensor) or found.shape != (2, embedding_size):
        raise ValueError(
            f"the backbone must map (B, {channels}, {height}, {width}) images to "
            f"(B, embedding_size = {embedding_size}) embeddings, got {describe(found)} for B = 2"
        )


def _build(config: TrainConfig, image_shape: tuple[int, ...]) -> nn.Module:
    height, width, channels = image_shape
    size, dimension = (height, width), config.embedding_size
    if config.backbone == "iresnet":
        return IResNet(size, channels, config.widths, config.depths, dimension, config.dropout)
    if config.backbone in PRESETS:
        depths = PRESETS[config.backbone]
        return PublishedIResNet(depths, size, channels, dimension, config.dropout)
    options = {"image_size": size, "channels": channels, "embedding_size": dimension}
    network = _function(config.backbone)(**options)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"backbone {config.backbone} must return a torch.nn.Module, got {describe(network)}"
        )
    check_embeddings(network, image_shape, dimension)
    return network


def _function(spec: str) -> Callable[..., object]:
    """Import ``package.module:function``; raise ValueError for one that cannot be called."""
    function = imported(f"backbone {spec}", spec)
    try:
        inspect.signature(function).bind(image_size=(1, 1), channels=1, embedding_size=1)
    except TypeError as error:
        raise ValueError(
            f"backbone {spec} must take the keyword arguments image_size=(H, W), channels and "
            f"embedding_size: {error}"
        ) from error
    return function
