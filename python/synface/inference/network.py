"""A trained network with its preprocessing, as one module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.check import check_device
from ..data import normalize
from ..data.formats.image_set import LabeledImages
from ..data.loading.augment import standard_strides
from ..evaluation.embedding import Readable, embed_store, unit_rows
from ..training.config import TrainConfig
from ..training.initial import network_of_weights
from ..training.model import load_backbone
from .given import NCHW, NHWC, came, check_layout, check_range, given

if TYPE_CHECKING:
    from .given import Images


class FaceNetwork(nn.Module):
    """A backbone with its preprocessing: images in, unit embeddings out.

    It is a module like any other: its parameters are the backbone's, `forward` is differentiable
    and follows `train()` and `eval()`.

    Args:
        backbone: maps (B, C, H, W) float32 in [-1, 1] to floating embeddings (B, D).
        image_shape: (H, W, C) of the images that it takes, C = 1 (grayscale) or 3 (RGB).
        embedding_size: D.
        flip: add the embedding of the horizontally flipped image before normalizing.
        description: facts about the backbone, in JSON types.

    Attributes:
        backbone, image_shape, embedding_size, flip, description: as given; `load` describes a run's
            network by its ``source``, ``step``, ``backbone``, ``widths`` and ``depths``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image_shape: tuple[int, int, int],
        embedding_size: int,
        *,
        flip: bool = True,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_shape, self.embedding_size, self.flip = image_shape, embedding_size, flip
        self.description = dict(description or {})

    def extra_repr(self) -> str:
        height, width, channels = self.image_shape
        return (
            f"image_shape=({height}, {width}, {channels}), embedding_size={self.embedding_size}, "
            f"flip={self.flip}"
        )

    def forward(self, images: Tensor, layout: str | None = None) -> Tensor:
        """Return the embeddings of a batch of images of the network's size and color.

        Args:
            images: (N, H, W, C) or (N, C, H, W), uint8 or floating point in [0, 1], on the
                network's device. `embed` takes images of other sizes, and files.
            layout: "NHWC" or "NCHW", needed only where both fit.

        Returns:
            (N, D) float32 unit rows.

        Raises:
            TypeError: for anything but a tensor.
            ValueError: for a tensor of another shape, dtype or range.
        """
        return unit_rows(self.backbone, self._normalized(images, layout), self.flip)

    def _normalized(self, images: Tensor, layout: str | None) -> Tensor:
        """Return images as the backbone takes them, (N, C, H, W) float32 in [-1, 1]."""
        height, width, channels = self.image_shape
        shapes = {NHWC: (height, width, channels), NCHW: (channels, height, width)}
        check_layout(layout)
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor, got {type(images).__name__}; the method embed takes "
                "paths, PIL images and arrays"
            )
        floating = images.is_floating_point()
        if not floating and images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 or floating point, got {came(images)}")
        fitting = [
            name
            for name, shape in shapes.items()
            if layout in (None, name) and images.ndim == 4 and tuple(images.shape[1:]) == shape
        ]
        if not fitting:
            expected = " or ".join(
                f"(N, {', '.join(map(str, shape))})"
                for name, shape in shapes.items()
                if layout in (None, name)
            )
            raise ValueError(
                f"images must be of shape {expected}, got {came(images)}; the method embed "
                "resizes and converts images"
            )
        if len(fitting) > 1:
            raise ValueError(
                f"images of shape {tuple(images.shape)} may be NHWC or NCHW: give layout="
            )
        if not floating:
            return normalize(images if fitting == [NHWC] else images.permute(0, 2, 3, 1))
        if not torch.compiler.is_compiling() and len(images):
            low, high = (float(each) for each in images.detach().aminmax())
            check_range("images", low, high)
        images = images.permute(0, 3, 1, 2) if fitting == [NHWC] else images
        # the bits of uint8 images over 255
        return standard_strides(images).float().mul(2.0).sub(1.0)

    def embed(
        self,
        images: Images,
        *,
        batch_size: int = 256,
        layout: str | None = None,
        bad: dict[int, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Return the embeddings of images of any size, in evaluation mode, without gradients.

        Images are turned by their EXIF orientation, converted to the network's color and resized to
        its size (antialiased, the aspect ratio changes), as `synface train` and `eval` read them.

        Args:
            images: a path, a PIL image, or an array or tensor of one image (H, W), (H, W, C) or
                (C, H, W), or of several, (N, H, W, C) or (N, C, H, W); or an iterable of paths, PIL
                images, and arrays or tensors of one image; or a set of images, as
                `synface.data.open_images` returns. Arrays have C = 1 or 3 and are uint8, or
                floating point in [0, 1], which is rounded to 8 bits.
            batch_size: images per call of the backbone.
            layout: "NHWC" (also for (H, W, C)) or "NCHW", needed where the first and the last axis
                of an image could both be its channels.
            bad: leave out images that cannot be decoded, and enter what is wrong with them here, by
                their index; None: they are an error.
            progress: called as progress(done, total), first with 0, then after each batch.

        Returns:
            (N, D) float32 unit rows, on the CPU, without those of bad images.

        Raises:
            TypeError: for an object of another kind.
            ValueError: for no images, arrays of another dtype, shape or range, and embeddings that
                are not finite.
            DataError: for files that cannot be decoded; the first five of a batch are named.

        Memory: the result, and three batches of decoded images.
        """
        store: Readable
        if isinstance(images, LabeledImages):
            store = images.store
        else:
            store = images if isinstance(images, Readable) else given(images, layout)
        if not len(store):
            raise ValueError("images must hold at least one image, got none")
        options: Any = {"bad": bad, "batch_size": batch_size, "progress": progress}
        return embed_store(
            self.backbone, store, self.image_shape, flip=self.flip, resize=True, **options
        )


def load(
    path: str | Path,
    *,
    backbone: nn.Module | str | None = None,
    device: torch.device | str = "cpu",
    flip: bool = True,
) -> FaceNetwork:
    """Return the network of a run's newest checkpoint (or of one checkpoint), to use it.

    Args:
        path: the folder of the run, or of one of its checkpoints; or a file of an IResNet's weights
            alone, as `synface export --safetensors` or insightface's arcface_torch write them.
        backbone: the module to load the parameters into, or the name of a function that builds it,
            as ``package.module:function``; required if the run's is not built in. A function that
            only the checkpoint names is not imported.
        device: of the network.
        flip: add the embedding of the horizontally flipped image before normalizing, as
            `synface eval` does.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: if there is none, it is damaged, or its backbone cannot be rebuilt or is
            another one.
        ValueError: for a device that torch does not have here, and a ``backbone`` for a file of
            weights.
    """
    on = check_device(device)
    network, image_shape, size, description = _trained(Path(path), backbone)
    return FaceNetwork(network, image_shape, size, flip=flip, description=description).eval().to(on)


def _trained(
    path: Path, backbone: nn.Module | str | None
) -> tuple[nn.Module, tuple[int, int, int], int, dict[str, Any]]:
    """Return a backbone, the (H, W, C) of its images, its embedding size and its description.

    Everything that depends on where a network comes from is here.
    """
    if path.is_file():
        if backbone is not None:
            raise ValueError(
                f"{path} is a file of weights, which tells an IResNet's sizes alone: give a run's "
                "folder with backbone"
            )
        loaded, sizes, image_size = network_of_weights(path)
        widths, depths = list(sizes.widths), list(sizes.depths)
        about = {"source": str(path), "backbone": "iresnet", "widths": widths, "depths": depths}
        return loaded, (*image_size, sizes.channels), sizes.embedding_size, about
    network, state = load_backbone(path, backbone)
    height, width, channels = state["data"]["image_shape"]
    config = TrainConfig.from_json(state["config"])
    facts: dict[str, Any] = {"source": str(path), "step": state["step"]}
    facts["backbone"] = config.backbone
    if config.backbone == "iresnet":
        facts |= {"widths": list(config.widths), "depths": list(config.depths)}
    return network, (height, width, channels), config.embedding_size, facts
