"""Similarity transforms of landmarks onto a template, and the warping of images by them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..common.check import check_number
from ..common.extras import extra
from ..data.formats.decode import MAX_PIXELS, DataError, check_given, in_mode

if TYPE_CHECKING:
    from PIL import Image

# Eyes, nose and corners of the mouth, left to right in the image, in a crop of 112×112.
ARCFACE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
SIDE = 112
# Residual of a fit, as a fraction of the template's variance. A face in profile leaves up to 0.49,
# left and right corners of the mouth that are exchanged 0.53, eyes 0.71, and both 0.95.
MAX_RESIDUAL = 0.5


def template(size: tuple[int, int] = (SIDE, SIDE), margin: float = 0.0) -> NDArray[np.float64]:
    """Return where the five landmarks lie in an aligned crop.

    ArcFace's template for 112×112 is scaled to the crop's height and centered, so (112, 96) gives
    SphereFace's template for 112×96.

    Args:
        size: (H, W) of the crop in pixels.
        margin: additional border on each side, as a fraction of ArcFace's crop.

    Returns:
        (5, 2) x and y in pixels: left eye, right eye, nose, left and right corner of the mouth, as
        seen in the image. The center of the first pixel is (0, 0), as in OpenCV.

    Raises:
        ValueError, TypeError: for a size or a margin that is none.

    Source: Deng et al., "ArcFace" (CVPR 2019); the numbers are insightface's `arcface_dst`.
    """
    height, width = check_size(size)
    check_number("margin", margin, 0, 10)
    center = np.array([width, height]) / 2
    scale = height / SIDE / (1 + 2 * margin)
    return (np.array(ARCFACE) + 0.5 - SIDE / 2) * scale + center - 0.5


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W); raise ValueError unless both are positive integers of a possible image."""
    sides = list(size) if isinstance(size, (tuple, list)) else [0]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or min(sides) < 1 or math.prod(sides) > MAX_PIXELS:
        raise ValueError(
            f"size must be (height, width) in pixels, at most {MAX_PIXELS:,} of them, got {size!r}"
        )
    return sides[0], sides[1]


def check_landmarks(landmarks: ArrayLike, name: str = "landmarks") -> NDArray[np.float64]:
    """Return landmarks (5, 2); raise ValueError unless they are finite and not all in one place."""
    try:
        points = np.asarray(landmarks, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be 5 points (x, y), got {landmarks!r}"[:200]) from None
    if points.shape != (5, 2):
        raise ValueError(f"{name} must be 5 points (x, y), got an array of shape {points.shape}")
    if not (np.isfinite(points).all() and np.abs(points).max() < 1e6):
        raise ValueError(f"{name} must be finite pixel coordinates, got {points.tolist()}")
    if np.ptp(points, axis=0).max() < 1:
        raise ValueError(f"{name} must be 5 different points, got {points.tolist()}")
    return points


def similarity(source: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Return the similarity transform that maps points closest to others, in least squares.

    Args:
        source: (N, 2) x and y. target: (N, 2), where they are to lie.

    Returns:
        (2, 3) matrix of rotation times scale, and shift; it never mirrors.

    Source: Umeyama, "Least-squares estimation of transformation parameters between two point
        patterns" (PAMI 1991); without mirroring, in two dimensions, it is a complex line fit.
    """
    z, w = (np.asarray(points, np.float64) @ np.array([1, 1j]) for points in (source, target))
    at, to = z.mean(), w.mean()
    turn = np.vdot(z - at, w - to) / np.vdot(z - at, z - at).real
    shift = to - turn * at
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def _fit(landmarks: NDArray[np.float64], size: tuple[int, int], margin: float) -> NDArray[Any]:
    """Return the (2, 3) transform to the template; raise DataError for landmarks in no such order.

    A transform that is fitted to points in another order shrinks the photo to a few pixels.
    """
    target = template(size, margin)
    matrix = similarity(landmarks, target)
    residual = ((apply(matrix, landmarks) - target) ** 2).sum()
    share = residual / ((target - target.mean(0)) ** 2).sum()
    if share > MAX_RESIDUAL:
        raise DataError(
            "the landmarks are not those of a face in the order left eye, right eye, nose, left "
            "and right corner of the mouth, where left is left in the photo, not the person's; got "
            f"{landmarks.round(1).tolist()}"
        )
    return matrix


def invert(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inverse of a (2, 3) transform."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def apply(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points (…, 2), transformed by a (2, 3) matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def warp(image: Image.Image, matrix: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    """Return an image, transformed by a similarity; black where the image does not reach.

    An image that is reduced is filtered first, so that it does not alias.

    Args:
        matrix: (2, 3), from the image's pixels to the result's.
        size: (H, W) of the result.

    Memory: the part of the image that the result shows, at the result's scale.
    """
    with extra("train", "aligning faces"):
        from PIL import Image

    height, width = size
    mode, back = image.mode, invert(matrix)
    # Pillow counts from the first pixel's corner, the matrix from its center.
    linear, offset = back[:, :2], back[:, 2] + 0.5 - back[:, :2] @ [0.5, 0.5]
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale < 1:
        corners = np.array([(0, 0), (width, 0), (0, height), (width, height)]) @ linear.T + offset
        border = math.ceil(3 / scale)  # pixels that the filters reach
        low = np.maximum(np.floor(corners.min(0)) - border, 0)
        high = np.minimum(np.ceil(corners.max(0)) + border, [image.width, image.height])
        if (high <= low).any():
            return Image.new(mode, (width, height))
        reduced = np.maximum(np.rint((high - low) * scale), 1)
        box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
        sides = (int(reduced[0]), int(reduced[1]))
        image = image.resize(sides, Image.Resampling.BICUBIC, box=box)
        factor = reduced / (high - low)
        linear, offset = linear * factor[:, None], (offset - low) * factor
    data = (*linear[0], offset[0], *linear[1], offset[1])
    affine, bicubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
    return image.transform((width, height), affine, tuple(map(float, data)), bicubic)


def align(
    image: Image.Image | NDArray[np.uint8],
    landmarks: ArrayLike,
    size: tuple[int, int] = (SIDE, SIDE),
    *,
    margin: float = 0.0,
    grayscale: bool = False,
) -> NDArray[np.uint8]:
    """Crop a face so that its landmarks lie on the template, as near as a similarity transform can.

    Args:
        image: Pillow image, or uint8 (H, W, 3) RGB, (H, W, 1) or (H, W); not turned by EXIF.
        landmarks: (5, 2) x and y in pixels, in the order of `template`.
        size: (H, W) of the crop. margin: see `template`.
        grayscale: return one channel, not three.

    Returns:
        (H, W, 3 or 1) uint8; black where the image does not reach.

    Raises:
        DataError: for landmarks that no similarity transform brings near the template.
        OSError: for an image of too many pixels, or more than 8 bits per channel.
        ValueError, TypeError: for invalid arguments.

    Source: the template is ArcFace's, see `template`; the transform Umeyama's, see `similarity`.

    Memory: the crop, and what `warp` needs; of an image that is not RGB, a copy that is.
    """
    size = check_size(size)
    matrix = _fit(check_landmarks(landmarks), size, margin)
    crop = in_mode(warp(to_pillow(image), matrix, size), "L" if grayscale else "RGB")
    return np.array(crop).reshape(*size, -1)


def to_pillow(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return a Pillow image, RGB, of an image as `align` takes it.

    Raises:
        OSError: for a Pillow image of too many pixels, or more than 8 bits per channel.
        TypeError, ValueError: for anything else.
    """
    with extra("train", "aligning faces"):
        from PIL import Image

    if isinstance(image, Image.Image):
        check_given(image)
        return in_mode(image, "RGB")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = (
            f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        )
        raise TypeError(f"image must be a Pillow image or an array of uint8, got {kind}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if (image.ndim != 2 and image.shape[2:] != (3,)) or not image.size:
        raise ValueError(f"image must be (H, W, 3), (H, W, 1) or (H, W), got {image.shape}")
    return in_mode(Image.fromarray(image), "RGB")
