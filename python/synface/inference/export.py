"""Networks in files for other programs, each checked against the network that it was made from."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import synface_kernels as sk

from ..common.check import first_line
from ..common.extras import extra
from ..common.files import replacing, write_tensors
from ..data import normalize
from .network import FaceNetwork

TOLERANCE = 1e-5  # of each coordinate of a unit embedding
BATCHES = (10, 3, 1)  # sizes at which a file is compared with the network
INPUT, OUTPUT = "images", "embeddings"
METADATA = "synface.json"  # the name of the metadata in TorchScript and torch.export files
Run = Callable[[Tensor], Tensor]


class ExportError(ValueError):
    """Error for a network that cannot be exported, or whose file computes something else."""


class ExportedNetwork(nn.Module):
    """The computation of exported files: a `FaceNetwork` on uint8 images, all in float32.

    In float32 because many runtimes do not have float64.
    """

    def __init__(self, backbone: nn.Module, flip: bool) -> None:
        super().__init__()
        self.backbone, self.flip = backbone, flip

    def forward(self, images: Tensor) -> Tensor:
        """Return unit embeddings (N, D) of images (N, H, W, C) uint8."""
        x = normalize(images)
        y = self.backbone(x)
        if self.flip:
            y = y + self.backbone(x.flip(-1))
        return F.normalize(y.float())


class Exporter:
    """Exports of one network, with its preprocessing inside, to one or several formats.

    The exported input is uint8 (N, H, W, C) of the network's size, for any N; the output float32
    (N, D), unit rows, the flipped image included if it is in the network's.

    Args:
        network: on any device; the files are made from a copy on the CPU, in evaluation mode.
        images: (M, H, W, C) uint8, M at least 1, to compare files with the network on, at most the
            first ten, besides ten pseudo-random images.

    Raises:
        ValueError: for images of another dtype or shape.
    """

    def __init__(self, network: FaceNetwork, images: NDArray[np.uint8] | None = None) -> None:
        shape = network.image_shape
        if images is not None and (
            images.dtype != np.uint8 or images.shape[1:] != shape or not len(images)
        ):
            raise ValueError(
                f"images must be uint8 of shape (M, {', '.join(map(str, shape))}), got "
                f"{images.dtype} {images.shape}"
            )
        self.network = copy.deepcopy(network).cpu().eval()
        self.module = ExportedNetwork(self.network.backbone, network.flip).eval()
        random = np.random.default_rng(0).integers(0, 256, (BATCHES[0], *shape), np.uint8)
        self._any_batch = {INPUT: {0: torch.export.Dim("N", min=1)}}
        known = [random] if images is None else [random, images[: BATCHES[0]]]
        self._checked = [torch.from_numpy(np.array(each)) for each in known]
        height, width, channels = shape
        self.metadata = {
            "synface": sk.__version__,
            "image_size": [height, width],
            "channels": channels,
            "color": "grayscale" if channels == 1 else "RGB",
            "embedding_size": network.embedding_size,
            "flip": network.flip,
            "step": network.description.get("step"),
        }

    def write(self, kind: str, path: str | Path) -> float:
        """Write a file atomically, load it again and compare its embeddings with the network's.

        Args:
            kind: "onnx", "torchscript", "torch-export" (`torch.export.load` reads it) or
                "safetensors" (the backbone's weights alone, under their own names).
            path: the file; one that exists is replaced.

        Returns:
            The largest difference of a coordinate of an embedding, at batch sizes 10, 3 and 1.

        Raises:
            ExportError: if torch cannot export the network, or the file's embeddings differ by more
                than 1e-5; then no file is written.
            ImportError: without onnxruntime or onnxscript, for "onnx".
            OSError: if the file cannot be written.
        """
        if kind not in _WRITERS:
            raise ValueError(f"kind must be one of {', '.join(_WRITERS)}, got {kind!r}")
        path = Path(path)
        with replacing(path) as part, _quiet():
            run = self._written(kind, path, part)
            difference = float(np.max(list(self._differences(path, run))))  # NaN if any is
            if not difference <= TOLERANCE:  # NaN neither
                raise ExportError(
                    f"{path} was not written: the embeddings of the exported {kind} file differ "
                    f"from the network's by up to {difference:.2g}, more than {TOLERANCE:g}"
                )
        return difference

    def _written(self, kind: str, path: Path, part: Path) -> Run:
        """Write a file, and return what runs it."""
        try:
            return _WRITERS[kind](self, part)
        except (ExportError, ImportError, OSError):
            raise
        except Exception as error:  # runtimes' own types have no common base
            raise ExportError(
                f"{path} was not written: the exported {kind} file cannot be written or loaded: "
                f"{first_line(error)}"
            ) from error

    @torch.no_grad()
    def _differences(self, path: Path, run: Run) -> Iterator[float]:
        """Yield the largest difference of each batch."""
        for images in self._checked:
            expected = self.network(images)
            for size in BATCHES:
                try:
                    found = run(images[:size])
                except Exception as error:  # runtimes' own types have no common base
                    raise ExportError(
                        f"{path} was not written: the exported file fails on a batch of "
                        f"{len(images[:size])}: {first_line(error)}"
                    ) from error
                wanted = expected[:size]
                if found.shape != wanted.shape:
                    raise ExportError(
                        f"{path} was not written: the exported file returns embeddings of shape "
                        f"{tuple(found.shape)}, expected {tuple(wanted.shape)}"
                    )
                yield float((found.double() - wanted.double()).abs().max())

    @cached_property
    def _program(self) -> torch.export.ExportedProgram:
        """The exported graph, of which two formats are made."""
        with self._exporting("torch.export"), torch.no_grad():
            example = (self._checked[0][:2],)
            return torch.export.export(self.module, example, dynamic_shapes=self._any_batch)

    @contextmanager
    def _exporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a backbone's own code may raise anything
            raise ExportError(f"{what} cannot export this network: {first_line(error)}") from error

    def _onnx(self, path: Path) -> Run:
        with extra("onnx", "the export to ONNX"):
            import onnxruntime
            import onnxscript  # noqa: F401, which torch.onnx needs

        program = self._program
        with self._exporting("torch.onnx"):
            exported = torch.onnx.export(
                program,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=self._any_batch,  # names the axis
                dynamo=True,
                verbose=False,
            )
            assert exported is not None
            facts = {key: json.dumps(value) for key, value in self.metadata.items()}
            exported.model.metadata_props.update(facts)
            exported.save(str(path), external_data=False)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    def _torchscript(self, path: Path) -> Run:
        with self._exporting("torch.jit.trace"), torch.no_grad():
            traced = torch.jit.trace(self.module, (self._checked[0][:2],), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(self.metadata)})
        return torch.jit.load(str(path))

    def _torch_export(self, path: Path) -> Run:
        with path.open("wb") as file:  # given a path, torch expects it to end in .pt2
            torch.export.save(
                self._program, file, extra_files={METADATA: json.dumps(self.metadata)}
            )
        return torch.export.load(io.BytesIO(path.read_bytes())).module()

    def _safetensors(self, path: Path) -> Run:
        with extra("train", "weights in safetensors"):
            from safetensors.torch import load_file

        facts = self.metadata | self.network.description
        left_out = ("source", "flip")  # a path of this machine, and no property of the weights
        metadata = {k: json.dumps(value) for k, value in facts.items() if k not in left_out}
        write_tensors(path, self.network.backbone.state_dict(), {"format": "pt"} | metadata)
        network = copy.deepcopy(self.network)
        network.backbone.load_state_dict(load_file(path))
        return network


_WRITERS: dict[str, Callable[[Exporter, Path], Run]] = {
    "onnx": Exporter._onnx,
    "torchscript": Exporter._torchscript,
    "torch-export": Exporter._torch_export,
    "safetensors": Exporter._safetensors,
}
KINDS: Sequence[str] = tuple(_WRITERS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say about themselves: deprecations, and optional packages."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        registration.setLevel(level)
