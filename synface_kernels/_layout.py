"""The order of the dimensions of images, without torch."""

from __future__ import annotations

from collections.abc import Sequence

_CHANNELS = (1, 3, 4)  # of gray, color, and color with alpha


def check_layout(shape: Sequence[int], layout: str) -> None:
    """Raise ValueError where images (B, C, H, W) are evidently taken for NHWC, the default.

    That is where the last dimension is none of 1, 3 and 4, and the second is.
    """
    if layout == "NHWC" and shape[3] not in _CHANNELS and shape[1] in _CHANNELS:
        raise ValueError(
            f'images of shape {tuple(shape)} would have {shape[3]} channels in layout="NHWC": '
            'give layout="NCHW" for (B, C, H, W) images'
        )
