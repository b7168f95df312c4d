"""A check of images' memory layout, without torch."""

from __future__ import annotations

from collections.abc import Sequence

_CHANNELS = (1, 3, 4)  # grayscale, RGB, RGBA


def check_layout(shape: Sequence[int], layout: str) -> None:
    """Raise ValueError where images are evidently (B, C, H, W) although the layout is NHWC.

    That is where the last dimension is none of 1, 3 and 4, and the second is one of them.
    """
    if layout == "NHWC" and shape[3] not in _CHANNELS and shape[1] in _CHANNELS:
        raise ValueError(
            f'images of shape {tuple(shape)} would have {shape[3]} channels in layout="NHWC": '
            'give layout="NCHW" for (B, C, H, W) images'
        )
