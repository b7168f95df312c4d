"""Embeddings and class centers as operands of the margin softmax's GEMMs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import launch
from . import kernel_triton as kernels
from .config_triton import Gemms, row_config
from .interface import count_classes


def sub_centers_of(weight: Tensor) -> int:
    return weight.shape[1] if weight.dim() == 3 else 1


def centers_of(weight: Tensor) -> Tensor:
    """Return all centers (C·M, D), one class's after the other."""
    return weight.flatten(0, 1) if weight.dim() == 3 else weight


def prepare_rows(
    matrix: Tensor,
    *,
    norms: Tensor | None = None,
    copy: Tensor | None = None,
    unit: bool = False,
    ids: Tensor | None = None,
    sub_centers: int = 1,
) -> None:
    """Write rows' inverse norms and copies, those of ids (classes) or all; see the kernel."""
    out = norms if norms is not None else copy
    assert out is not None
    count, d = out.shape[0], matrix.shape[1]
    config = row_config(d)
    launch(
        kernels._prepare_rows_kernel, (triton.cdiv(count, config["BLOCK_R"]),),
        matrix, matrix if ids is None else ids, out if copy is None else copy,
        out if norms is None else norms, count, matrix.stride(0), D=d, M=sub_centers,
        IDS=ids is not None, COPY=copy is not None, UNIT=unit, NORMS=norms is not None, **config,
    )  # fmt: skip


class Rows(NamedTuple):
    """Embeddings as operands.

    Attributes:
        gemm: (N, D) for the logits' GEMM; scale: (N,) what its dot products are multiplied by.
        gradient: (N, D) for the weight gradient's GEMM.
        norms: (N,) inverse norms.
    """

    gemm: Tensor
    scale: Tensor
    gradient: Tensor
    norms: Tensor


def as_rows(input: Tensor, gemms: Gemms, for_gradient: bool) -> Rows:
    """Return embeddings as operands, with their inverse norms."""
    norms = input.new_empty(len(input), dtype=torch.float32)
    as_given = input.dtype == gemms.dtype
    unit = gemms.unit_input or (gemms.plain and for_gradient)
    copy = None
    if unit or not as_given:
        copy = torch.empty_like(input, dtype=gemms.dtype, memory_format=torch.contiguous_format)
    prepare_rows(input, norms=norms, copy=copy, unit=unit)
    gradient = input if copy is None else copy
    return Rows(
        gemm=input if as_given else gradient,
        scale=torch.ones_like(norms) if gemms.unit_input else norms,
        gradient=gradient,
        norms=norms,
    )


class Tile(NamedTuple):
    """A tile of ``columns`` classes, of M centers each.

    Attributes:
        start, columns: the first class and their number.
        gemm, scale, gradient: the centers (·, D) and what dot products with them are multiplied
            by (·,), as in `Rows`; gradient is for the input gradient's GEMM.
        centers, ids: where the centers are: rows of a matrix, or its classes ids.
        norms: (·,) the centers' inverse norms.
    """

    start: int
    columns: int
    gemm: Tensor
    scale: Tensor
    gradient: Tensor
    centers: Tensor
    ids: Tensor | None
    norms: Tensor


def _buffers(
    weight: Tensor, class_ids: Tensor | None, gemms: Gemms, for_gradient: bool
) -> tuple[bool, bool]:
    """Return whether a tile's centers are copied, and whether unit rows are held beside them."""
    copies = class_ids is not None or weight.dtype != gemms.dtype
    return copies, gemms.plain and for_gradient and not gemms.unit_weight


class Tiles:
    """The centers in tiles of classes, copied to a buffer where they cannot be read in place.

    Args:
        norms: (S·M,) inverse norms of all centers; written first where ``write_norms``.
        for_gradient: whether unit operands are needed for the input gradient.
    """

    def __init__(
        self,
        weight: Tensor,
        class_ids: Tensor | None,
        gemms: Gemms,
        norms: Tensor,
        classes: int,
        *,
        write_norms: bool,
        for_gradient: bool,
    ) -> None:
        self.weight, self.class_ids, self.gemms, self.norms = weight, class_ids, gemms, norms
        self.write_norms = write_norms
        self.sub_centers = sub_centers_of(weight)
        self.count, self.classes = count_classes(weight, class_ids), classes
        self.copies, unit = _buffers(weight, class_ids, gemms, for_gradient)
        self.stride = classes * self.sub_centers
        shape = (min(classes, self.count) * self.sub_centers, weight.shape[-1])
        empty = weight.new_empty
        self.rows = empty(shape if self.copies else 0, dtype=gemms.dtype)
        self.unit = empty(shape if unit else 0, dtype=gemms.dtype)
        self.ones = torch.ones_like(norms[: shape[0]] if gemms.unit_weight else norms[:0])

    @staticmethod
    def bytes_per_center(
        weight: Tensor, class_ids: Tensor | None, gemms: Gemms, for_gradient: bool
    ) -> int:
        """Return what the buffers take for each center of a tile."""
        buffers = sum(_buffers(weight, class_ids, gemms, for_gradient))
        return buffers * weight.shape[-1] * gemms.dtype.itemsize

    def __iter__(self) -> Iterator[Tile]:
        m, gemms = self.sub_centers, self.gemms
        all_centers = centers_of(self.weight)
        for start in range(0, self.count, self.classes):
            end = min(start + self.classes, self.count)
            first, last = start * m, end * m
            norms, ids, centers = self.norms[first:last], None, all_centers
            if self.class_ids is None:
                centers = all_centers[first:last]
            else:
                ids = self.class_ids[start:end]
            gemm = gradient = centers
            given: dict[str, Any] = {"ids": ids, "sub_centers": m}
            if self.copies:
                gemm = gradient = self.rows[: last - first]
                prepare_rows(
                    centers, norms=norms if self.write_norms else None, copy=gemm,
                    unit=gemms.unit_weight, **given,
                )  # fmt: skip
            elif self.write_norms:
                prepare_rows(centers, norms=norms, **given)
            if len(self.unit):
                gradient = self.unit[: last - first]
                prepare_rows(centers, copy=gradient, unit=True, **given)
            scale = self.ones[: last - first] if gemms.unit_weight else norms
            yield Tile(start, end - start, gemm, scale, gradient, centers, ids, norms)
