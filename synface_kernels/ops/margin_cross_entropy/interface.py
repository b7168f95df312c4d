"""Named structures that cross the layers of the margin softmax: public function, core, kernels.

torch's custom ops take flat arguments. `ForwardInputs`, `BackwardInputs` and `OptimizerStep` hold
runs of them in the order of the ops' schemas, and are packed and unpacked only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ForwardInputs(NamedTuple):
    """The core's forward arguments.

    Attributes:
        input: (N, D); weight: (C, D) or (C, M, D); both float64 or neither.
        class_ids: (S,) int64 rows of weight that are used; None: all, S = C.
        labels: (N, K) int64 in [0, S), distinct within a row, −1 where absent, −2 where a label's
            center is not in weight.
        scale: of the logits.
        limit: other classes with a larger cosine are filtered, left out; ∞ for none.
        needs_input_grad: whether to return the mean center.
        needs_cosine_sum: whether to return the sum of all cosines; not with sub-centers.
    """

    input: Tensor
    weight: Tensor
    class_ids: Tensor | None
    labels: Tensor
    scale: float
    limit: float
    needs_input_grad: bool
    needs_cosine_sum: bool


class ForwardOutputs(NamedTuple):
    """Statistics of the classes that are not a row's labels.

    All are 0 for a row without labels. What was not asked for has shape (0,).

    Attributes:
        negative_lse: (N,) float64 log-sum-exp of the other classes' logits; −∞ if there are none.
        negative_max: (N,) the other classes' greatest cosine, likewise.
        target_cosine: (N, K) float64 cosines with the row's own labels.
        filtered: (N,) float64, how many classes the limit leaves out.
        cosine_sum: (N,) float64 sum of the cosines with all classes.
        mean_center: (N, D) normalized centers, averaged by the other classes' probabilities; on a
            GPU (0,), for the backward pass computes the input's gradient.
        center_sum: (D,) float64 sum of all normalized centers, likewise.
        saved: for the backward pass. On a CPU (S', N) cosines of the first classes' centers, in the
            workspace, or (S, D) or (S, M, D) of weight's dtype, the memory of its gradient, with
            some cosines at the start of each center's row; on a GPU (S·M,) inverse norms of the
            centers.
    """

    negative_lse: Tensor
    negative_max: Tensor
    target_cosine: Tensor
    filtered: Tensor
    cosine_sum: Tensor
    mean_center: Tensor
    center_sum: Tensor
    saved: Tensor


class BackwardInputs(NamedTuple):
    """The core's backward arguments.

    Attributes:
        input, weight, class_ids, labels, scale, limit: as in `ForwardInputs`.
        negative_lse, mean_center, center_sum, saved: as in `ForwardOutputs`.
        grad_negative_lse (N,), grad_target_cosine (N, K), grad_cosine_sum (N,): the loss's float64
            gradients by these outputs; the last is (0,) without the cosine sum.
        needs_input_grad: whether to return the input's gradient, which needs the mean center.
    """

    input: Tensor
    weight: Tensor
    class_ids: Tensor | None
    labels: Tensor
    negative_lse: Tensor
    mean_center: Tensor
    center_sum: Tensor
    saved: Tensor
    grad_negative_lse: Tensor
    grad_target_cosine: Tensor
    grad_cosine_sum: Tensor
    scale: float
    limit: float
    needs_input_grad: bool


class OptimizerStep(NamedTuple):
    """An optimizer's step on the centers, taken in the backward pass; see `row_update.updates`."""

    rule: str
    states: list[Tensor]
    last_step: Tensor | None
    numbers: list[float]
    step: int
    seed: int | None


class Statistics(NamedTuple):
    """The core's statistics per row, over the classes of one process or of all ranks.

    Attributes:
        negative_lse, negative_max, target_cosine, filtered, cosine_sum: as in `ForwardOutputs`.
            ``filtered`` is None without a limit, ``cosine_sum`` without label smoothing.
        num_classes: (N,) float64, of how many classes cosine_sum is the sum; None beside None.
    """

    negative_lse: Tensor
    negative_max: Tensor
    target_cosine: Tensor
    filtered: Tensor | None = None
    cosine_sum: Tensor | None = None
    num_classes: Tensor | None = None


class Prepared(NamedTuple):
    """Checked arguments: the implementation, labels (N, K), −1 where absent, and their weights.

    ``gemm_dtype``: autocast's; None without it.
    """

    impl: str
    labels: Tensor
    label_weight: Tensor
    gemm_dtype: torch.dtype | None


def split_forward(arguments: Sequence[Any]) -> tuple[ForwardInputs, Sequence[Any]]:
    """Return a forward op's arguments by their names, and the rest of them."""
    count = len(ForwardInputs._fields)
    return ForwardInputs(*arguments[:count]), _filled(arguments[count:], 4)


def split_backward(
    arguments: Sequence[Any], options: int = 4
) -> tuple[BackwardInputs, Sequence[Any]]:
    """Return a backward op's arguments by their names, and its options, the rest of them."""
    count = len(BackwardInputs._fields)
    return BackwardInputs(*arguments[:count]), _filled(arguments[count:], options)


def split_update(arguments: Sequence[Any]) -> tuple[BackwardInputs, OptimizerStep, Sequence[Any]]:
    """Return an update op's arguments by their names, and the rest of them."""
    count, step = len(BackwardInputs._fields), len(OptimizerStep._fields)
    split_bf16, *rest = _filled(arguments[count:], step + 3)
    optimizer_step = OptimizerStep(*rest[:step])
    return BackwardInputs(*arguments[:count]), optimizer_step, [split_bf16, *rest[step:]]


def _filled(options: Sequence[Any], count: int) -> Sequence[Any]:
    """Return an op's last arguments; the dispatcher leaves out a GEMM dtype of None, the last."""
    return [*options, None] if len(options) < count else options


def count_classes(weight: Tensor, class_ids: Tensor | None) -> int:
    """Return the number of classes that are used."""
    return (weight if class_ids is None else class_ids).shape[0]


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of losses and statistics: float64 for float64 inputs, else float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32
