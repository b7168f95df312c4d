"""Checks of the margin softmax's arguments: types, dtypes, shapes, devices, options."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..._check import describe, integer, is_dense, require
from .margins import CombinedMargin


def check_class_ids(class_ids: Tensor, num_classes: int) -> None:
    """Raise ValueError unless class ids are in range and rise strictly."""
    inside = (class_ids >= 0) & (class_ids < num_classes)
    require(inside, f"class_ids must be in [0, {num_classes})", class_ids)
    require(class_ids.diff() > 0, "class_ids must rise strictly", class_ids[1:])


def checked_workspace(workspace: Any) -> int | Literal["auto"]:
    """Return ``"auto"`` or a number of bytes; raise TypeError or ValueError for anything else."""
    if isinstance(workspace, str):
        if workspace == "auto":
            return "auto"
        raise ValueError(f'workspace must be "auto" or a number of bytes, got {workspace!r}')
    return integer("workspace", workspace, 0)


def check_arguments(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: CombinedMargin,
    target_weight: Tensor | None,
    mix: str,
    class_ids: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless all fit together.

    Values of labels, their weights and class ids are checked with the targets.
    """
    for name, tensor in (("input", input), ("weight", weight), ("target", target)):
        if not is_dense(tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    if not isinstance(margin, CombinedMargin):
        raise TypeError(
            "margin must be an ArcFace, CosFace, SphereFace or CombinedMargin, "
            f"got {type(margin).__name__}"
        )
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for name, tensor, dims, shape in (
        ("input", input, (2,), "(N, D)"),
        ("weight", weight, (2, 3), "(C, D) or (C, M, D)"),
    ):
        if tensor.dtype not in allowed or tensor.dim() not in dims:
            raise ValueError(
                f"{name} must be float32, bfloat16, float16 or float64 of shape {shape}, "
                f"got {describe(tensor)}"
            )
    if (input.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            "input and weight must both be float64 or neither, "
            f"got input {describe(input)} and weight {describe(weight)}"
        )
    if input.shape[1] != weight.shape[-1] or input.shape[1] < 1:
        raise ValueError(
            "input (N, D) and weight (C, D) or (C, M, D) must have the same D ≥ 1, "
            f"got {describe(input)} and {describe(weight)}"
        )
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(
            "weight (C, D) or (C, M, D) must have at least one class, and each class a center, "
            f"got {describe(weight)}"
        )
    n = input.shape[0]
    if target.dtype != torch.int64 or target.dim() not in (1, 2) or target.shape[0] != n:
        raise ValueError(
            f"target must be int64 of shape (N,) or (N, K) with N = {n} as in input, "
            f"got {describe(target)}"
        )
    if target.dim() == 2 and target.shape[1] < 1:
        raise ValueError(f"target (N, K) must have K ≥ 1, got {describe(target)}")
    if target.dim() == 2 and target_weight is None:
        raise ValueError(
            f"target_weight (N, K) is required with (N, K) targets: {describe(target)}"
        )
    if target_weight is not None:
        if not is_dense(target_weight):
            raise TypeError(f"target_weight must be a tensor, got {describe(target_weight)}")
        if (
            target.dim() != 2
            or not target_weight.is_floating_point()
            or target_weight.shape != target.shape
        ):
            raise ValueError(
                "target_weight must be floating point of the shape of an (N, K) target, "
                f"got {describe(target_weight)} with target {describe(target)}"
            )
        if target_weight.requires_grad:
            raise ValueError("target_weight gets no gradient: pass target_weight.detach()")
    if class_ids is not None:
        if not is_dense(class_ids):
            raise TypeError(f"class_ids must be a tensor, got {describe(class_ids)}")
        if class_ids.dtype != torch.int64 or class_ids.dim() != 1 or class_ids.shape[0] < 1:
            raise ValueError(
                f"class_ids must be int64 of shape (S,), S ≥ 1, got {describe(class_ids)}"
            )
    others = {
        "weight": weight,
        "target": target,
        "target_weight": target_weight,
        "class_ids": class_ids,
    }
    for name, other in others.items():
        if other is not None and other.device != input.device:
            raise ValueError(
                f"{name} must be on input's device {input.device}, got {describe(other)}"
            )
    margin.check_rows(n, input.device)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing > 0 and margin.limit < math.inf:
        raise ValueError(
            "label_smoothing asks for every class what interclass_filter leaves out: give one of "
            f"them, got {label_smoothing} and {margin.interclass_filter}"
        )
    if label_smoothing > 0 and weight.dim() == 3:
        raise NotImplementedError(
            f"label_smoothing is not built for sub-centers, weight (C, M, D): {describe(weight)}"
        )
    if mix not in ("joint", "separate"):
        raise ValueError(f"mix must be 'joint' or 'separate', got {mix!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
