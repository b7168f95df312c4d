"""The face generators by name: heads, eigenfaces, and models in files."""

from __future__ import annotations

from pathlib import Path

from ..common.check import check_device
from .controls import Columns
from .eigenfaces import EigenfaceGenerator
from .heads.generator import HeadGenerator
from .in_file import OnnxGenerator, TorchScriptGenerator
from .interface import FaceGenerator

__all__ = [
    "EigenfaceGenerator",
    "FaceGenerator",
    "HeadGenerator",
    "OnnxGenerator",
    "TorchScriptGenerator",
    "open_generator",
]
EMBEDDED = {"heads": HeadGenerator, "eigenfaces": EigenfaceGenerator}


def open_generator(
    path: str | Path | None,
    embedding_size: int | None = None,
    *,
    style_size: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    device: str = "cpu",
    columns: Columns | str | None = None,
) -> FaceGenerator:
    """Return an embedded generator, or the one in a file: ONNX if it ends in .onnx, or TorchScript.

    Args:
        path: "heads" (also None) or "eigenfaces", which need no file; else a file. A TorchScript
            file is a program that this runs.
        embedding_size: D; a file may state it.
        style_size: S, if the file does not state it.
        size: height and width of an embedded generator's images in pixels; those of a file are
            fixed. channels: 1 or 3, of the heads.
        device: the device that a file and the heads run on.
        columns: which columns of a file's input are which; see `TorchScriptGenerator`.

    Raises:
        ValueError, ImportError, DataError: as the generators.
    """
    name = "heads" if path is None else str(path)
    if name not in EMBEDDED:
        for option, value in (("size", size), ("channels", channels)):
            if value is not None:
                raise ValueError(
                    f"{option} is for the eigenfaces and the heads: that of {path} is fixed"
                )
        kind = OnnxGenerator if Path(name).suffix.lower() == ".onnx" else TorchScriptGenerator
        return kind(name, embedding_size, style_size, device, columns)
    check_device(device)
    if columns is not None:
        raise ValueError(f"columns are for generators in files: those of the {name} are known")
    if embedding_size is None:
        raise ValueError(f"embedding_size of the {name} must be given, got None")
    sizes = {} if size is None else {"size": size}
    found: FaceGenerator
    if name == "eigenfaces":
        if channels not in (None, 1):
            raise ValueError(f"channels of the eigenfaces is 1, got {channels}")
        found = EigenfaceGenerator(embedding_size, **sizes)
    else:
        colors = 1 if channels is None else channels
        found = HeadGenerator(embedding_size, channels=colors, device=device, **sizes)
    if style_size not in (None, found.style_size):
        raise ValueError(f"style_size of the {name} is {found.style_size}, got {style_size}")
    return found
