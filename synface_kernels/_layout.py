"""The order of the dimensions of images, without torch."""

from __future__ import annotations

from collections.abc import Sequence

_CHANNELS = (1, 3, 4)  # of gray, color, and color with alpha


def check_layout(shape: Sequence[int], layout: str) -> None:
    """Raise ValueError where four-dimensional images are evidently of the other layout.

    That is where the dimension that should be the channels is none of 1, 3 and 4, and the one that
    would be in the other layout is.
    """
    first, last = shape[1], shape[3]
    channels, elsewhere = (last, first) if layout == "NHWC" else (first, last)
    if channels not in _CHANNELS and elsewhere in _CHANNELS:
        other, order = ("NCHW", "(B, C, H, W)") if layout == "NHWC" else ("NHWC", "(B, H, W, C)")
        raise ValueError(
            f'images of shape {tuple(shape)} would have {channels} channels in layout="{layout}": '
            f'give layout="{other}" for {order} images'
        )
