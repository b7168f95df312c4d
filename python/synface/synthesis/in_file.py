"""Face generators in files: TorchScript and ONNX."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.check import check_device, check_least
from ..common.extras import extra
from ..common.rng import seeded
from .controls import (
    IDENTITY,
    Columns,
    check_columns,
    count_columns,
    describe_columns,
    latent,
    parse_columns,
    style_controls,
)
from .interface import check_arguments, dtype_name

SIZES = ("embedding_size", "style_size")
ONE_INPUT = "; of a model with one input say which columns are which (columns)"


class _InFile:
    """Base class of generators in files: sizes, columns, and images from the model's output."""

    def __init__(
        self,
        path: Path,
        kind: str,
        asked: tuple[int | None, int | None],
        inside: list[Any],
        columns: Columns | None,
    ) -> None:
        self._path, self._columns = path, columns
        if columns is not None and self._takes_latent:
            first, end = columns[IDENTITY]
            own = end - first, count_columns(columns) - (end - first)
            for name, size, stated in zip(SIZES, own, inside, strict=True):
                if isinstance(stated, int) and stated != size:
                    raise ValueError(f"{path}: {name} is {stated}, its columns say {size}")
            inside = list(own)
        found = {n: _size(path, n, *each) for n, *each in zip(SIZES, asked, inside, strict=True)}
        self.embedding_size, self.style_size = found.values()
        self.controls = {} if columns is None else style_controls(columns)
        if (
            columns is not None
            and (named := sum(map(len, self.controls.values()))) != self.style_size
        ):
            raise ValueError(
                f"{path}: columns name {named} numbers of the style, which has {self.style_size}"
            )
        self.description = (
            {"kind": kind, "sha256": sha256(path)} | found | describe_columns(columns)
        )
        two = (
            torch.eye(2, self.embedding_size, dtype=torch.float32, device="cpu"),
            torch.zeros(2, self.style_size, dtype=torch.float32, device="cpu"),
            torch.arange(2, device="cpu"),
        )
        height, width, channels = _images(path, self._run(*two), 2).shape[1:]
        self.image_shape = (height, width, channels)

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        check_arguments(self, embedding, style, seed)
        return _images(self._path, self._run(embedding, style, seed), len(seed), self.image_shape)

    @property
    def _takes_latent(self) -> bool:
        """True if the model takes λ, with the identity among its columns."""
        return self._columns is not None and IDENTITY in self._columns

    def _inputs(self, embedding: Tensor, style: Tensor) -> list[Tensor]:
        """Return the model's inputs before the seed."""
        if self._columns is not None and self._takes_latent:
            return [latent(self._columns, embedding, style)]
        return [embedding, style]

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

    ``columns`` says which columns are which, as {"pose": (0, 3), "light": (3, 30)} or as text,
    "pose=0:3, light=3:30"; they become `controls`. If "identity" is among them, the model takes one
    input λ (and a seed, if it takes two), as DiscoFaceGAN does: (B, L) float32, standard normal for
    random embeddings, where the identity's columns hold the embedding times √D and the others, in
    their order, the style.

    Args:
        path: the file.
        embedding_size: D; by default the file's attribute of that name, or the identity's columns.
        style_size: S, at least 1; by default the file's attribute of that name, or the columns.
        device: the device that it runs on.
        columns: by name, the first column and the one after the last, of λ or of the style; by
            default the file's attribute of that name, if it has one, as text.

    Raises:
        ValueError: for columns that overlap, leave a gap or do not fit, a device that torch does
            not have, a file that is missing or no TorchScript, sizes that are unknown or disagree,
            and a model that fails or returns something else on a batch of two.
    """

    def __init__(
        self,
        path: str | Path,
        embedding_size: int | None = None,
        style_size: int | None = None,
        device: str = "cpu",
        columns: Columns | str | None = None,
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
        named = _columns(path, columns, getattr(self._model, "columns", None))
        plain = len(_arguments(named))
        if arguments not in (plain, plain + 1):
            expected = ", ".join(_arguments(named))
            raise ValueError(
                f"{path}: forward must take ({expected}) or ({expected}, seed), "
                f"it takes {arguments} arguments{ONE_INPUT if named is None else ''}"
            )
        self._seeded = arguments > plain
        inside = [getattr(self._model, name, None) for name in SIZES]
        super().__init__(path, "torchscript", (embedding_size, style_size), inside, named)

    @torch.inference_mode()
    def _run(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        inputs = [*self._inputs(embedding, style), *([seed] if self._seeded else [])]
        with seeded(int(seed[0]), self._device):
            try:
                return self._model(*(x.to(self._device) for x in inputs))
            except Exception as error:  # a model's own error has any type
                raise ValueError(_failed(self._path, embedding, style, error)) from error


class OnnxGenerator(_InFile):
    """A generator in an ONNX file, run by onnxruntime (`pip install "synface-kernels[onnx]"`).

    Its inputs are, in this order, the embedding, the style (or λ instead of both) and, if there is
    another, the seed (int64); its first output is what `TorchScriptGenerator` describes. A file
    exported for a fixed batch is run in batches of that size, the last one padded. Random operators
    need seeds in the file, or the images differ each time.

    Args:
        path: the file.
        embedding_size: D; by default the input's fixed size.
        style_size: S, at least 1; by default the input's fixed size.
        device: "cpu" or "cuda" (with onnxruntime-gpu).
        columns: as for `TorchScriptGenerator`; by default the file's metadata of that name.

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
        columns: Columns | str | None = None,
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
        stated = self._session.get_modelmeta().custom_metadata_map.get("columns")
        named = _columns(path, columns, stated)
        plain = len(_arguments(named))
        if len(inputs) not in (plain, plain + 1) or any(len(s) != 2 for s in shapes[:plain]):
            came = ", ".join(f"{x.name} {x.shape}" for x in inputs)
            expected = "λ (B, L)" if plain == 1 else "embedding (B, D), style (B, S)"
            raise ValueError(
                f"{path}: the inputs must be {expected} and, optionally, seed (B,), got {came}"
                f"{ONE_INPUT if named is None else ''}"
            )
        self._names = [x.name for x in inputs]
        self._batch = shapes[0][0] if isinstance(shapes[0][0], int) else None
        inside = [shape[1] for shape in shapes[:plain]]
        if plain == 1:  # λ, whose parts ONNX does not state
            if named and isinstance(inside[0], int) and inside[0] != count_columns(named):
                raise ValueError(
                    f"{path}: columns name {count_columns(named)} numbers, λ has {inside[0]}"
                )
            inside = [None, None]
        super().__init__(path, "onnx", (embedding_size, style_size), inside, named)

    def _run(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        count = len(seed)
        batch = self._batch or count
        filled = torch.arange(-(-count // batch) * batch, device="cpu").clamp_(max=count - 1)
        outputs = []
        for rows in filled.split(batch):
            rowwise = (x[rows] for x in (embedding, style))
            inputs = [x.cpu().numpy() for x in (*self._inputs(*rowwise), seed[rows])]
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


def _columns(path: Path, given: Columns | str | None, stated: Any) -> Columns | None:
    """Return the columns that are given, or that a file states, checked."""
    columns = stated if given is None and isinstance(stated, str) else given
    if columns is None:
        return None
    try:
        return check_columns(parse_columns(columns) if isinstance(columns, str) else columns)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _arguments(columns: Columns | None) -> list[str]:
    return ["λ"] if columns and IDENTITY in columns else ["embedding", "style"]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    came = f"{dtype_name(output.dtype)} {tuple(output.shape)} for B = {batch}"
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
