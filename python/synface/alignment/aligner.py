"""Detection and alignment in one object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..common.check import check_integer, check_number
from ..common.extras import extra
from ..data.formats import decode
from ..data.formats.decode import DataError
from .detector import SMALLEST, Detector, RetinaFace
from .photos import read_photo
from .transform import SIDE, align, check_landmarks, check_size, template, to_pillow

if TYPE_CHECKING:
    from PIL import Image

FACES = ("largest", "center", "all")


@dataclass(frozen=True, eq=False)
class AlignedFace:
    """A face, cropped to a template.

    Attributes:
        pixels: (H, W, 3 or 1) uint8.
        landmarks: (5, 2) x and y in the photo's pixels, see `template`.
        score: of the detector; None for landmarks that were given.
        box: (4,) left, top, right and bottom in the photo's pixels; None likewise.
    """

    pixels: NDArray[np.uint8]
    landmarks: NDArray[np.float64]
    score: float | None = None
    box: NDArray[np.float64] | None = None


class Aligner:
    """Find the faces of photos, and crop them to ArcFace's template.

    Calls from several threads are safe if the detector's are.

    Args:
        size: (H, W) of the crops in pixels.
        detector: see `Detector`; None uses `RetinaFace`, loaded with the first photo.
        choose: which faces a call returns: "largest", "center" (the nearest to the photo's center)
            or "all".
        threshold: smallest score of a face.
        min_face: smallest shorter side of a face's box, in pixels.
        margin: additional border of the crops, see `template`.
        grayscale: return one channel, not three.

    Raises:
        ValueError, TypeError: for invalid arguments.

    Source: ArcFace's template, see `template`.

    Memory: a call needs the photo twice in RGB, what the detector needs, and the crops.
    """

    def __init__(
        self,
        size: tuple[int, int] = (SIDE, SIDE),
        detector: Detector | None = None,
        *,
        choose: str = "largest",
        threshold: float = 0.7,
        min_face: int = SMALLEST,
        margin: float = 0.0,
        grayscale: bool = False,
    ) -> None:
        if choose not in FACES:
            raise ValueError(f"choose must be one of {', '.join(FACES)}, got {choose!r}")
        check_number("threshold", threshold, 0, 1)
        check_integer("min_face", min_face, 1)
        template(size, margin)
        self.size, self.choose = check_size(size), choose
        self.threshold, self.min_face = threshold, min_face
        self.margin, self.grayscale = margin, grayscale
        self._detector = detector

    def __call__(self, image: Image.Image | NDArray[np.uint8] | str | Path) -> list[AlignedFace]:
        """Return the faces of a photo that `choose` names: none, one or more.

        Args:
            image: file or Pillow image, which are turned by their EXIF orientation, or uint8
                (H, W, 3) RGB, (H, W, 1) or (H, W).

        Raises:
            OSError: for a file that cannot be read, and a Pillow image of more than 8 bits per
                channel.
            DataError: for landmarks of the detector that are not in the order of `template`.
            TypeError, ValueError: for another image, and for a detector that returns something else
                than `Detector` says.
            ImportError: if `RetinaFace` lacks a package.
        """
        return self._crop(image, self.choose)

    def faces(self, image: Image.Image | NDArray[np.uint8] | str | Path) -> list[AlignedFace]:
        """Return all faces of a photo, the largest first; as a call otherwise."""
        return self._crop(image, "all")

    def at(
        self, image: Image.Image | NDArray[np.uint8] | str | Path, landmarks: NDArray[np.float64]
    ) -> AlignedFace:
        """Return the face at given landmarks (5, 2); the detector is not asked.

        Raises:
            DataError: if the landmarks lie outside the photo, or are not in the order of
                `template`. Others as a call's.
        """
        photo, landmarks = _photo(image), check_landmarks(landmarks)
        if not ((landmarks.mean(0) >= 0) & (landmarks.mean(0) < photo.size)).all():
            raise DataError(
                f"the landmarks lie outside the photo of {photo.width}x{photo.height} pixels "
                f"(width x height), at {landmarks.round(1).tolist()}"
            )
        return AlignedFace(self._align(photo, landmarks), landmarks)

    @property
    def detector(self) -> Detector:
        """Return the detector; `RetinaFace` is loaded when it is first asked for."""
        if self._detector is None:
            self._detector = RetinaFace(min_face=self.min_face, threshold=self.threshold)
        return self._detector

    @property
    def no_face(self) -> str:
        """Return what a photo lacks for which a call returns no face, in words."""
        return f"no face found of {self.min_face} pixels or more and a score of {self.threshold:g}"

    def _crop(
        self, image: Image.Image | NDArray[np.uint8] | str | Path, choose: str
    ) -> list[AlignedFace]:
        photo = _photo(image)
        boxes, scores, landmarks = self._detect(np.asarray(photo))
        sides = boxes[:, 2:] - boxes[:, :2]
        fit = np.flatnonzero((scores >= self.threshold) & (sides.min(1) >= self.min_face))
        order = fit[np.argsort(-sides[fit].prod(1), kind="stable")]
        if choose == "center":
            center = (np.array(photo.size) - 1) / 2
            away = np.linalg.norm(boxes[order].reshape(-1, 2, 2).mean(1) - center, axis=1)
            order = order[np.argsort(away, kind="stable")]
        chosen = order if choose == "all" else order[:1]
        return [
            AlignedFace(self._align(photo, landmarks[i]), landmarks[i], float(scores[i]), boxes[i])
            for i in chosen
        ]

    def _align(self, photo: Image.Image, points: NDArray[np.float64]) -> NDArray[np.uint8]:
        return align(photo, points, self.size, margin=self.margin, grayscale=self.grayscale)

    def _detect(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], ...]:
        """Return the detector's arrays, checked."""
        found = self.detector(pixels)
        try:
            boxes, scores, landmarks = (np.asarray(each, np.float64) for each in found)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "the detector must return boxes (F, 4), scores (F,) and landmarks (F, 5, 2), got "
                f"{type(found).__name__}: {error}"
            ) from error
        count = len(scores) if scores.ndim else -1
        shapes = [each.shape for each in (boxes, scores, landmarks)]
        if shapes != [(count, 4), (count,), (count, 5, 2)]:
            raise ValueError(
                "the detector must return boxes (F, 4), scores (F,) and landmarks (F, 5, 2), got "
                f"arrays of shapes {', '.join(map(str, shapes))}"
            )
        if not all(np.isfinite(each).all() for each in (boxes, scores, landmarks)):
            raise ValueError("the detector must return finite numbers, got infinite ones or NaN")
        return boxes, scores, landmarks


def _photo(image: Image.Image | NDArray[np.uint8] | str | Path) -> Image.Image:
    """Return an image as calls take it, upright and in RGB."""
    with extra("train", "aligning faces"):
        from PIL import Image

    if isinstance(image, (str, Path)):
        return read_photo(image)
    return to_pillow(decode.loaded(image) if isinstance(image, Image.Image) else image)
