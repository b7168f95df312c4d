"""Face generators, from embeddings to images: the interface, eigenfaces, and models in files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..common.check import check_device, check_least, check_memory
from ..common.extras import extra
from ..common.rng import normals, seeded
from ..data.embedded import FACES, STYLES, enlarge, lfw_crops, restyle, to_bytes

SIZES = ("embedding_size", "style_size")


class FaceGenerator(Protocol):
    """A face generator: the embedding sets the identity, the style everything else.

    Attributes:
        embedding_size: D.
        style_size: S.
        image_shape: (H, W, C), C = 1 (grayscale) or 3 (RGB).
        description: identifies the generator, for `json.dumps`.
    """

    embedding_size: int
    style_size: int
    image_shape: tuple[int, int, int]
    description: dict[str, Any]

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return one image per row.

        Args:
            embedding: (B, D) float32, unit rows.
            style: (B, S) float32, to be drawn from a standard normal distribution.
            seed: (B,) int64, not negative: random seed of each image, beside its style.

        Returns:
            (B, H, W, C) uint8 on the CPU; the same arguments give the same bits.

        Raises:
            ValueError: for arguments of another shape or dtype.
        """
        ...


class EigenfaceGenerator:
    """Face generator from the eigenfaces of scikit-image's 100 LFW crops; needs no file.

    With the eigenfaces v_k and the standard deviations s_k of the crops along them, k <= K =
    min(99, D), the face of a unit embedding e is mean + sum_k s_k * sqrt(D) * (Q e)_k * v_k. Q is
    (K, D) with orthonormal rows, and always the same. A random e gives coefficients of unit
    variance, so the faces vary as the crops do. Up to D = 99 the coefficients have the embeddings'
    cosines; past that Q is a random projection. Pixels weigh the leading eigenfaces most: they keep
    the order of the cosines on average, not for every pair.

    The ten numbers of a style, mapped by the normal distribution function, are the arguments of
    `synface.data.embedded.restyle`: rotation, zoom, shift, blur, light and noise.

    Each image is bitwise independent of the others in its batch.

    Args:
        embedding_size: D, at least 2.
        size: height and width in pixels, at least 8.

    Raises:
        ValueError: for an argument out of range.
        DataError: if scikit-image's file is missing or not as expected.

    Memory: 5 KB * D.

    Source: Turk, Pentland, "Eigenfaces for Recognition", Journal of Cognitive Neuroscience 1991.
    """

    style_size = STYLES

    def __init__(self, embedding_size: int, size: int = 48) -> None:
        check_least("embedding_size", embedding_size, 2)
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        self.embedding_size = embedding_size
        self.image_shape = (size, size, 1)
        self.description = {"kind": "eigenfaces", "embedding_size": embedding_size, "size": size}
        crops = torch.from_numpy(lfw_crops())
        self._mean = crops.mean(0)
        centered = (crops - self._mean).flatten(1)
        _, singular, eigenfaces = torch.linalg.svd(centered, full_matrices=False)
        rank = min(FACES - 1, embedding_size)
        deviations = singular[:rank, None] / math.sqrt(FACES - 1)
        gaussian = np.random.default_rng(0).standard_normal((embedding_size, rank))
        rotation, triangle = torch.linalg.qr(torch.from_numpy(gaussian))
        # Signs are free in both factorizations: fixed, so that any LAPACK gives the same faces.
        rotation = rotation * triangle.diagonal().sign()
        largest = eigenfaces.gather(1, eigenfaces.abs().argmax(1, keepdim=True))
        axes = (eigenfaces * largest.sign())[:rank] * deviations * math.sqrt(embedding_size)
        # Numbers on a grid have sums that are exact in float64, in any order.
        self._axes = _on_grid(rotation @ axes)

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        _check_arguments(self, embedding, style, seed)
        count, side = len(seed), self.image_shape[0]
        check_memory(f"{count} faces of {side}x{side} pixels at once", count * side**2 * 12 * 4)
        faces = enlarge(self.faces(embedding), self.image_shape[0])
        noise = [normals(faces.shape[1:], torch.Generator().manual_seed(s)) for s in seed.tolist()]
        images = restyle(faces, torch.special.ndtr(style), torch.stack(noise))
        return to_bytes(images).permute(0, 2, 3, 1)

    def faces(self, embedding: Tensor) -> Tensor:
        """Return (B, 25, 25) float64 faces in [0, 1], without any style, of (B, D) unit rows."""
        offset = _on_grid(embedding.double()) @ self._axes
        return (self._mean + offset.unflatten(1, self._mean.shape)).clamp_(0.0, 1.0)


class _InFile:
    """Base class of generators in files: sizes, and images from the model's output."""

    def __init__(
        self, path: Path, kind: str, asked: tuple[int | None, int | None], inside: list[Any]
    ) -> None:
        self._path = path
        found = {n: _size(path, n, *each) for n, *each in zip(SIZES, asked, inside, strict=True)}
        self.embedding_size, self.style_size = found.values()
        self.description = {"kind": kind, "sha256": sha256(path)} | found
        two = (
            torch.eye(2, self.embedding_size, dtype=torch.float32, device="cpu"),
            torch.zeros(2, self.style_size, dtype=torch.float32, device="cpu"),
            torch.arange(2, device="cpu"),
        )
        height, width, channels = _images(path, self._run(*two), 2).shape[1:]
        self.image_shape = (height, width, channels)

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        _check_arguments(self, embedding, style, seed)
        return _images(self._path, self._run(embedding, style, seed), len(seed), self.image_shape)

    def _run(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Any:
        """Return the model's output, for `_images`."""
        raise NotImplementedError


class TorchScriptGenerator(_InFile):
    """A generator in a TorchScript file (`torch.jit.save`). Its code is run: load trusted files
    only.

    TorchScript is a program; nothing like `weights_only` limits what it does. It is called as
    ``model(embedding, style)`` or, if it takes three, ``model(embedding, style, seed)``, with the
    arguments of `FaceGenerator.generate`. It returns uint8 (B, H, W, C), or floating point
    (B, C, H, W) in [-1, 1] (values outside are clamped, and values beyond ±2 rejected). Torch's
    global generator is seeded with the batch's first seed.

    Args:
        path: the file.
        embedding_size: D; by default the file's attribute of that name.
        style_size: S, at least 1; by default the file's attribute of that name.
        device: the device that it runs on.

    Raises:
        ValueError: for a device that torch does not have, a file that is missing or no TorchScript,
            sizes that are unknown or disagree, and a model that fails or returns something else on
            a batch of two.
    """

    def __init__(
        self,
        path: str | Path,
        embedding_size: int | None = None,
        style_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        path = Path(path)
        self._device = check_device(device)
        try:
            self._model = torch.jit.load(str(path), map_location=self._device).eval()
            arguments = len(self._model.forward.schema.arguments) - 1
        except (RuntimeError, ValueError, OSError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be loaded as TorchScript on {device!r} ({_last_line(error)}); "
                "expected a file that torch.jit.save wrote (weights alone are not enough)"
            ) from error
        if arguments not in (2, 3):
            raise ValueError(
                f"{path}: forward must take (embedding, style) or (embedding, style, seed), "
                f"it takes {arguments} arguments"
            )
        self._seeded = arguments == 3
        inside = [getattr(self._model, name, None) for name in SIZES]
        super().__init__(path, "torchscript", (embedding_size, style_size), inside)

    @torch.inference_mode()
    def _run(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        inputs = [x.to(self._device) for x in (embedding, style, seed)]
        with seeded(int(seed[0]), self._device):
            try:
                return self._model(*inputs[: 3 if self._seeded else 2])
            except Exception as error:  # a model's own error has any type
                raise ValueError(_failed(self._path, embedding, style, error)) from error


class OnnxGenerator(_InFile):
    """A generator in an ONNX file, run by onnxruntime (`pip install "synface-kernels[onnx]"`).

    Its inputs are, in this order, the embedding, the style and, if there is a third, the seed
    (int64); its first output is what `TorchScriptGenerator` describes. A file exported for a fixed
    batch is run in batches of that size, the last one padded. Random operators need seeds in the
    file, or the images differ each time.

    Args:
        path: the file.
        embedding_size: D; by default the input's fixed size.
        style_size: S, at least 1; by default the input's fixed size.
        device: "cpu" or "cuda" (with onnxruntime-gpu).

    Raises:
        ImportError: without onnxruntime.
        ValueError: for a file that is missing or no ONNX model, sizes that are unknown or disagree,
            a device that onnxruntime does not offer, and a model that fails or returns something
            else on a batch of two.
    """

    def __init__(
        self,
        path: str | Path,
        embedding_size: int | None = None,
        style_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        path = Path(path)
        with extra("onnx", path):
            import onnxruntime
        provider = f"{str(device).partition(':')[0].upper()}ExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise ValueError(
                f"device must be one of those of onnxruntime "
                f"({', '.join(onnxruntime.get_available_providers())}), got {device!r}"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, [provider])
        except Exception as error:  # onnxruntime's own types have no common base
            raise ValueError(
                f"{path} cannot be loaded as an ONNX model: {_last_line(error)}"
            ) from error
        inputs = self._session.get_inputs()
        shapes = [x.shape for x in inputs]
        if len(inputs) not in (2, 3) or len(shapes[0]) != 2 or len(shapes[1]) != 2:
            came = ", ".join(f"{x.name} {x.shape}" for x in inputs)
            raise ValueError(
                f"{path}: the inputs must be embedding (B, D), style (B, S) and, optionally, "
                f"seed (B,), got {came}"
            )
        self._names = [x.name for x in inputs]
        self._batch = shapes[0][0] if isinstance(shapes[0][0], int) else None
        inside = [shape[1] for shape in shapes[:2]]
        super().__init__(path, "onnx", (embedding_size, style_size), inside)

    def _run(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        count = len(seed)
        batch = self._batch or count
        filled = torch.arange(-(-count // batch) * batch, device="cpu").clamp_(max=count - 1)
        outputs = []
        for rows in filled.split(batch):
            inputs = (x[rows].cpu().numpy() for x in (embedding, style, seed))
            feed = dict(zip(self._names, inputs, strict=False))  # a model may take no seed
            try:
                outputs.append(self._session.run(None, feed)[0])
            except Exception as error:
                raise ValueError(_failed(self._path, embedding, style, error)) from error
        try:
            images = torch.from_numpy(np.concatenate(outputs))
        except (TypeError, ValueError) as error:  # strings, say, or a number
            raise ValueError(_failed(self._path, embedding, style, error)) from error
        return images[:count] if len(images) == len(filled) else images  # `_images` refuses it


def open_generator(
    path: str | Path | None,
    embedding_size: int,
    *,
    style_size: int | None = None,
    size: int | None = None,
    device: str = "cpu",
) -> FaceGenerator:
    """Return the generator in a file (ONNX if it ends in .onnx, else TorchScript), or eigenfaces.

    Args:
        path: None for eigenfaces. A TorchScript file is a program that this runs.
        embedding_size: D.
        style_size: S, if the file does not state it.
        size: height and width of the eigenfaces' images in pixels; those of a file are fixed.
        device: the device that a file runs on.

    Raises:
        ValueError, ImportError, DataError: as the generators.
    """
    if path is None:
        check_device(device)
        if style_size not in (None, STYLES):
            raise ValueError(f"style_size of the eigenfaces is {STYLES}, got {style_size}")
        return EigenfaceGenerator(embedding_size, **({} if size is None else {"size": size}))
    if size is not None:
        raise ValueError(f"size is for the eigenfaces: that of {path} is fixed")
    kind = OnnxGenerator if Path(path).suffix.lower() == ".onnx" else TorchScriptGenerator
    return kind(path, embedding_size, style_size, device)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _on_grid(x: Tensor) -> Tensor:
    return torch.round(x * 2.0**22) / 2.0**22


def _check_arguments(
    generator: FaceGenerator, embedding: Tensor, style: Tensor, seed: Tensor
) -> None:
    batch = len(seed) if seed.ndim else 0
    for name, tensor, dtype, shape in (
        ("seed", seed, torch.int64, (batch,)),
        ("embedding", embedding, torch.float32, (batch, generator.embedding_size)),
        ("style", style, torch.float32, (batch, generator.style_size)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not batch:
            raise ValueError(
                f"{name} must be {_name(dtype)} of shape {shape} with at least one row, "
                f"got {_name(tensor.dtype)} {tuple(tensor.shape)}"
            )


def _size(path: Path, name: str, asked: int | None, inside: Any) -> int:
    """Return D or S, from the file or the argument; raise ValueError if these differ."""
    inside = inside if isinstance(inside, int) else None  # a name stands for any size in ONNX
    if inside is None and asked is None:
        raise ValueError(f"{path} does not state its {name}: give it")
    if inside is not None and asked not in (None, inside):
        raise ValueError(f"{name} of {path} is {inside}, got {asked}")
    size = inside if asked is None else asked
    assert size is not None
    check_least(name, size, 1)
    return size


def _images(
    path: Path, output: Any, batch: int, shape: tuple[int, int, int] | None = None
) -> Tensor:
    """Return a model's output as (B, H, W, C) uint8 on the CPU."""
    expected = "uint8 (B, H, W, C) or floating point (B, C, H, W) in [-1, 1], C = 1 or 3"
    if not isinstance(output, Tensor):
        raise ValueError(f"{path} must return {expected}; got {type(output).__name__}")
    came = f"{_name(output.dtype)} {tuple(output.shape)} for B = {batch}"
    floating = output.is_floating_point()
    if output.ndim != 4 or not (floating or output.dtype == torch.uint8):
        raise ValueError(f"{path} must return {expected}; got {came}")
    images = output.detach().cpu()
    if floating:
        images = images.permute(0, 2, 3, 1)
    if len(images) != batch or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{path} must return {expected}; got {came}")
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(
            f"{path} returned images of shape {tuple(images.shape[1:])}, earlier {shape}"
        )
    if not floating:
        return images
    largest = float(images.abs().max())  # nan if any is
    if not largest <= 2.0:
        raise ValueError(f"{path} must return {expected}; got values up to ±{largest:g}")
    return images.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_().to(torch.uint8)


def _failed(path: Path, embedding: Tensor, style: Tensor, error: Exception) -> str:
    return (
        f"{path} failed on embedding {tuple(embedding.shape)} and style {tuple(style.shape)}: "
        f"{_last_line(error)}"
    )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
