"""Launchers of the margin softmax's Triton kernels, and their default configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from .._triton import WORKSPACE_BYTES, launch, mm
from ..row_update import kernel_triton as row_update
from . import kernel_triton as kernels
from .interface import (
    BackwardInputs,
    ForwardInputs,
    ForwardOutputs,
    OptimizerStep,
    count_classes,
)

# Takes the weight's gradient a tile at a time: the first class, and rows (·, D) that the next tile
# overwrites.
GradTileCallback = Callable[[int, Tensor], None]

# Tiles are a multiple of this many classes, so that rows of the workspace stay aligned.
TILE_ALIGNMENT = 128

# exp() of a logit minus a row's shift must stay in float32's range, e^±87, also when it is
# multiplied by an inverse norm: at most 1e12 = e^27.6, at least some e^-12.
EXPONENT_MAX = 60.0
EXPONENT_MIN = -75.0


# ---- configurations ------------------------------------------------------------------------------


def _fused_config(
    n: int, gemm_dtype: torch.dtype, precision: str, capability: int
) -> dict[str, int]:
    """Return the largest blocks that fit two programs on a multiprocessor and hardly spill."""
    block_n = min(128, max(16, triton.next_power_of_2(n)))
    if gemm_dtype == torch.float32 and precision == "ieee":  # no tensor cores
        return {
            "BLOCK_N": min(64, block_n), "BLOCK_C": 64, "BLOCK_D": 32,
            "num_warps": 8, "num_stages": 2,
        }  # fmt: skip
    return {
        "BLOCK_N": block_n, "BLOCK_C": 128 if capability == 90 or block_n < 128 else 64,
        "BLOCK_D": 128 // gemm_dtype.itemsize, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def _tile_config(n: int) -> dict[str, int]:
    """Return the blocks of the kernels that read a tile of logits."""
    block_n = min(4, triton.next_power_of_2(n))
    return {"BLOCK_N": block_n, "BLOCK_C": 2048 // block_n, "num_warps": 4}


def _row_config(d: int) -> dict[str, int]:
    """Return the blocks of the kernels that hold several whole rows of D elements."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_R": max(1, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4}


def _one_row_config(d: int) -> dict[str, int]:
    """Return the blocks of the kernels that hold one row of D elements."""
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_D": block_d, "num_warps": min(8, max(1, block_d // 128))}


def _tile_classes(c: int, bytes_per_class: int) -> int:
    """Return the classes per tile: as many as fit the workspace, in tiles of about equal width."""
    fits = max(1, WORKSPACE_BYTES // bytes_per_class // TILE_ALIGNMENT) * TILE_ALIGNMENT
    return _round_up(triton.cdiv(c, triton.cdiv(c, fits)), TILE_ALIGNMENT)


def _round_up(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple


# ---- forward -------------------------------------------------------------------------------------


class _Negatives(NamedTuple):
    """Statistics of all rows' other classes, also of rows without labels; see `ForwardOutputs`."""

    negative_lse: Tensor
    negative_max: Tensor
    filtered: Tensor
    mean_center: Tensor
    center_sum: Tensor


def forward(inputs: ForwardInputs, *, gemm_dtype: torch.dtype | None = None) -> ForwardOutputs:
    """Return statistics of the classes that are not a row's labels; no cosines are saved.

    Args:
        inputs: float32, bfloat16 or float16 matrices on one CUDA device (or on the CPU in Triton's
            interpreter). Where their dtypes differ, both are taken as float32.

    Returns:
        negative_max and mean_center in float32; the others in float64, though log-sum-exps and
        target cosines are computed in float32.

    Memory above inputs and outputs, in bytes:
        of a plain weight without the mean center 4·C + 8·N·(splits + 1),
        splits ≤ ⌈4·SMs/⌈N/128⌉⌉; else max(64 MiB, 128 classes) of tile at (4·N + 2·N [bfloat16] +
        4·D [float16 or mixed dtypes] + 4 + a row of weight [class_ids]) per center, and O(N·D). An
        input or weight whose rows are not contiguous is copied.

    Raises:
        ValueError: for float64, which has no kernel here.
    """
    inputs = _with_contiguous_rows(inputs)
    input, weight, labels = inputs.input, inputs.weight, inputs.labels
    (n, d), filters = input.shape, inputs.limit < math.inf
    input_r = torch.empty(n, dtype=torch.float32, device=input.device)
    target_cosine = input_r.new_empty(labels.shape)
    exact = input_r.new_zeros(n, dtype=torch.float64)
    saved = input_r.new_empty((0, n))
    if n == 0:
        return ForwardOutputs(
            negative_lse=exact,
            negative_max=input_r,
            target_cosine=target_cosine.double(),
            filtered=exact.clone(),
            cosine_sum=exact.clone(),
            mean_center=input_r.new_empty((0, d) if inputs.needs_input_grad else 0),
            center_sum=exact.new_zeros(d if inputs.needs_cosine_sum else 0),
            saved=saved,
        )
    _find_targets(inputs, target_cosine)
    # As in backward: a last bit more or less in r_i, times the scale, is in every probability.
    _inverse_norms(input, input_r)
    plain = inputs.class_ids is None and weight.dim() == 2
    plain = plain and not filters and not inputs.needs_cosine_sum
    cast = weight.dtype != _gemm_dtypes(input, weight)[0]
    if plain and not cast and not inputs.needs_input_grad:
        found = _forward_fused(input, weight, labels, input_r, inputs.scale)
    else:
        found = _forward_tiled(inputs, input_r)
    # The hardware's maximum skips a NaN, the sum does not.
    negative_max = torch.where(found.negative_lse.isnan(), torch.nan, found.negative_max)
    valid = (labels != -1).any(1)
    mean_center, filtered, cosine_sum = found.mean_center, found.filtered, exact[:0]
    if inputs.needs_input_grad:
        mean_center = torch.where(valid[:, None], mean_center, 0)
    if filters:
        filtered = torch.where(valid, filtered, 0)
    if inputs.needs_cosine_sum:
        sums = (input.double() @ found.center_sum) * input_r
        cosine_sum = torch.where(valid, sums, 0)
    return ForwardOutputs(
        negative_lse=torch.where(valid, found.negative_lse, 0).double(),
        negative_max=torch.where(valid, negative_max, 0),
        target_cosine=target_cosine.double(),
        filtered=filtered,
        cosine_sum=cosine_sum,
        mean_center=mean_center,
        center_sum=found.center_sum,
        saved=saved,
    )


def _find_targets(inputs: ForwardInputs | BackwardInputs, target_cosine: Tensor) -> Tensor:
    """Fill target_cosine (N, K); return each label's row of weight, as of centers (C·M, D).

    A negative label is returned as it is.
    """
    labels, class_ids = inputs.labels, inputs.class_ids
    n, d = inputs.input.shape
    centers = _centers(inputs.weight)
    target_rows = torch.empty_like(labels)
    classes = labels
    if class_ids is not None:
        classes = torch.where(labels >= 0, class_ids[labels.clamp_min(0)], labels)
    launch(
        kernels._target_cosines_kernel, (n,),
        inputs.input, centers, classes, target_cosine, target_rows,
        inputs.input.stride(0), centers.stride(0), D=d, K=labels.shape[1],
        M=_sub_centers(inputs.weight), **_one_row_config(d),
    )  # fmt: skip
    return target_rows


def _forward_fused(
    input: Tensor, weight: Tensor, labels: Tensor, input_r: Tensor, scale: float
) -> _Negatives:
    """Compute logits within the kernel, for a weight in the GEMM's dtype.

    In the kernel, a cast before `tl.dot` must not be, for then Triton 3.6 and 3.7 take TF32 on
    compute capability 10, for any input_precision.
    """
    (n, d), c = input.shape, weight.shape[0]
    gemm_dtype = weight.dtype
    input = input.to(gemm_dtype)
    precision = _float32_precision() if gemm_dtype == torch.float32 else "ieee"
    capability, multiprocessors = _properties(input.device)
    config = _fused_config(n, gemm_dtype, precision, capability)
    if gemm_dtype == torch.bfloat16 and input.device.type == "cpu":
        # The interpreter's dot takes bfloat16 for integers.
        input, weight = input.float(), weight.float()

    row_blocks, class_blocks = triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(c, config["BLOCK_C"])
    splits = min(class_blocks, triton.cdiv(4 * multiprocessors, row_blocks))
    classes_per_split = triton.cdiv(class_blocks, splits) * config["BLOCK_C"]
    splits = triton.cdiv(c, classes_per_split)

    weight_r = _inverse_norms(weight, input_r.new_empty(c))
    maximum = input_r.new_empty((splits, n))
    total = torch.empty_like(maximum)
    launch(
        kernels._fused_kernel, (row_blocks, splits),
        input, weight, labels, input_r, weight_r, maximum,
        total, n, c, classes_per_split, input.stride(0), weight.stride(0), scale,
        D=d, K=labels.shape[1], PRECISION=precision, **config,
    )  # fmt: skip
    negative_max = maximum.amax(0)
    reference = torch.where(negative_max == -torch.inf, 0, negative_max)
    total = (total * torch.exp(scale * (maximum - reference))).sum(0)
    none = input_r.new_empty(0)
    return _Negatives(
        negative_lse=scale * reference + torch.log(total),
        negative_max=negative_max,
        filtered=none.double(),
        mean_center=none,
        center_sum=none.double(),
    )


def _forward_tiled(inputs: ForwardInputs, input_r: Tensor) -> _Negatives:
    """Write tiles of logits into a workspace and reduce them there."""
    input, weight, labels, scale = inputs.input, inputs.weight, inputs.labels, inputs.scale
    filters, needs_mean_center = inputs.limit < math.inf, inputs.needs_input_grad
    n, d = input.shape
    gemm_dtype, factor_dtype = _gemm_dtypes(input, weight)
    tiles = _Tiles(inputs, gemm_dtype, _bytes_per_center(input, weight, inputs.class_ids))
    config = _tile_config(n)
    row_blocks = triton.cdiv(n, config["BLOCK_N"])
    chunks = min(triton.cdiv(tiles.classes, config["BLOCK_C"]), triton.cdiv(1024, row_blocks))
    chunk = _round_up(triton.cdiv(tiles.classes, chunks), config["BLOCK_C"])

    # One shift serves all cosines, unless exp() of what is left can leave float32's range: then
    # the shift follows each row's maximum, tile by tile, up from the least logit.
    middle = max(0.0, scale - EXPONENT_MAX)
    follow = -scale - middle < EXPONENT_MIN
    shift = torch.full_like(input_r, -scale if follow else middle)
    maximum = input_r.new_full((chunks, n), -torch.inf)
    total = torch.zeros_like(maximum)
    mean_center = input_r.new_zeros((n, d) if needs_mean_center else 0)
    part = torch.empty_like(mean_center)
    filtered = input_r.new_zeros((chunks, n) if filters else 0, dtype=torch.int32)
    center_sums = input_r.new_zeros((64, d) if inputs.needs_cosine_sum else 0, dtype=torch.float64)
    probabilities = tiles.factor(factor_dtype)
    for start, own, rows, weight_r in tiles:
        columns = rows.shape[0] // tiles.sub_centers
        if inputs.needs_cosine_sum:
            programs = center_sums.shape[0]
            launch(
                kernels._center_sums_kernel, (programs,),
                own, weight_r, center_sums, own.shape[0],
                own.stride(0), triton.cdiv(own.shape[0], programs), D=d, **_one_row_config(d),
            )  # fmt: skip
        for maximum_only in (True, False) if follow else (False,):
            launch(
                kernels._tile_statistics_kernel, (row_blocks, triton.cdiv(columns, chunk)),
                tiles.logits, probabilities, labels, input_r, weight_r, shift, maximum, total,
                filtered, n, columns, tiles.stride, start, chunk, scale, inputs.limit,
                K=labels.shape[1], M=tiles.sub_centers, FILTER=filters,
                MAXIMUM_ONLY=maximum_only, **config,
            )  # fmt: skip
            if maximum_only:
                raised = torch.maximum(shift, scale * maximum.amax(0))
                decay = torch.exp(shift - raised)
                total *= decay
                if needs_mean_center:
                    mean_center *= decay[:, None]
                shift = raised
        if needs_mean_center:
            mean_center += mm(probabilities[:, : rows.shape[0]], rows.to(factor_dtype), part)
    total = total.sum(0)
    if needs_mean_center:
        mean_center /= torch.where(total == 0, 1, total)[:, None]
    return _Negatives(
        negative_lse=shift + torch.log(total),
        negative_max=maximum.amax(0),
        filtered=filtered.sum(0).double() if filters else filtered.double(),
        mean_center=mean_center,
        center_sum=center_sums.sum(0) if inputs.needs_cosine_sum else center_sums,
    )


# ---- backward ------------------------------------------------------------------------------------


def backward(
    inputs: BackwardInputs,
    needs_weight_grad: bool,
    on_grad_tile: GradTileCallback | None = None,
    *,
    gemm_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return gradients by input and weight from those by the forward pass's outputs.

    Args:
        inputs: as in `forward`. Of the outputs' float64 gradients, all but the cosine sum's are
            taken in float32.
        needs_weight_grad: whether to return the weight's gradient.
        on_grad_tile: is given the weight's gradient, a tile at a time, instead.

    Returns:
        grad_input (N, D) in input's dtype, grad_rows (S, D) or (S, M, D) in weight's dtype; (0,)
        for one that is not needed. Rows without labels, or whose three gradients are all 0, give
        and get no gradient, even if they hold NaN.

    Memory above the gradients: as forward's tile, and 4·D more per class for a 16-bit weight.

    Raises:
        ValueError: for float64, which has no kernel here.
    """
    inputs = _with_contiguous_rows(inputs)
    inputs = inputs._replace(
        negative_lse=inputs.negative_lse.float().contiguous(),
        mean_center=inputs.mean_center.contiguous(),
        grad_negative_lse=inputs.grad_negative_lse.float().contiguous(),
        grad_target_cosine=inputs.grad_target_cosine.float().contiguous(),
        grad_cosine_sum=inputs.grad_cosine_sum.contiguous(),
    )
    input, weight = inputs.input, inputs.weight
    n, d = input.shape
    grad_input = input.new_empty((n, d) if inputs.needs_input_grad else 0)
    shape = (count_classes(weight, inputs.class_ids), *weight.shape[1:])
    grad_rows = weight.new_empty(shape if needs_weight_grad else 0)
    if n == 0:
        return grad_input, grad_rows.zero_()
    target_rows = _find_targets(inputs, torch.empty_like(inputs.grad_target_cosine))
    if inputs.needs_input_grad:
        centers = _centers(weight)
        launch(
            kernels._grad_input_kernel, (n,),
            input, centers, target_rows, inputs.mean_center, inputs.center_sum,
            inputs.grad_negative_lse, inputs.grad_target_cosine, inputs.grad_cosine_sum,
            grad_input, input.stride(0), centers.stride(0), inputs.scale, D=d,
            K=inputs.labels.shape[1], SUM=inputs.center_sum.numel() > 0, **_one_row_config(d),
        )  # fmt: skip
    if on_grad_tile is not None:
        _compute_grad_rows(inputs, target_rows, None, on_grad_tile)
    elif needs_weight_grad:
        _compute_grad_rows(inputs, target_rows, _centers(grad_rows), None)
    return grad_input, grad_rows


def update(
    inputs: BackwardInputs, step: OptimizerStep, *, gemm_dtype: torch.dtype | None = None
) -> Tensor:
    """Compute the gradients, and take an optimizer's step on the centers a tile at a time.

    Args:
        inputs: as in `backward`; the weight has contiguous rows, and is written.
        step: its states are (C, M·D).

    Returns:
        grad_input, as `backward`.

    Memory above the gradient: as backward's tile, and M·D more of the weight per class.
    """
    weight, class_ids = inputs.weight, inputs.class_ids
    matrix = weight.flatten(1)

    def step_tile(start: int, rows: Tensor) -> None:
        rows = rows.view(-1, matrix.shape[1])
        end = start + rows.shape[0]
        if class_ids is None:
            ids = torch.arange(start, end, device=weight.device)
        else:
            ids = class_ids[start:end]
        tile = row_update.Update(matrix, rows, ids, step.last_step, step.step, step.seed)
        own: list[Any] = [*step.states, *step.numbers]
        if step.rule == "sgd":
            *numbers, nesterov = step.numbers
            own = [step.states[0] if step.states else None, *numbers, bool(nesterov)]
        getattr(row_update, step.rule)(tile, *own)

    if inputs.input.shape[0] == 0:
        step_tile(0, weight.new_zeros(matrix.shape[1]).expand(count_classes(weight, class_ids), -1))
    return backward(inputs, False, step_tile)[0]


def _compute_grad_rows(
    inputs: BackwardInputs,
    target_rows: Tensor,
    grad_rows: Tensor | None,
    on_grad_tile: GradTileCallback | None,
) -> None:
    """Compute the weight's gradient, into grad_rows (S·M, D) or else for the callback."""
    input, weight, labels = inputs.input, inputs.weight, inputs.labels
    grad_cosine_sum = inputs.grad_cosine_sum
    n, d = input.shape
    # A row without labels, or with zero gradients only, may hold NaN, which must not reach the
    # sums over rows.
    has_grad = (inputs.grad_negative_lse != 0) | (inputs.grad_target_cosine != 0).any(1)
    if grad_cosine_sum.numel() > 0:
        has_grad |= grad_cosine_sum != 0
    has_grad &= (labels != -1).any(1)
    input = torch.where(has_grad[:, None], input, 0)
    # exp(logit − ∞) is 0 at any scale: where the softmax is empty, or its gradient is 0.
    in_softmax = has_grad & (inputs.grad_negative_lse != 0) & (inputs.negative_lse != -math.inf)
    negative_lse = torch.where(in_softmax, inputs.negative_lse, math.inf)
    input_r = _inverse_norms(input, negative_lse.new_empty(n))
    gemm_dtype, factor_dtype = _gemm_dtypes(input, weight)
    x = input.to(factor_dtype)
    in_place = weight.dtype == torch.float32
    per_center = _bytes_per_center(input, weight, inputs.class_ids) + (0 if in_place else 4 * d)
    per_center += 0 if on_grad_tile is None else weight.itemsize * d
    tiles = _Tiles(inputs._replace(input=input), gemm_dtype, per_center)
    sums = None if in_place else negative_lse.new_empty((tiles.stride, d))
    tile_rows = weight.new_empty((tiles.stride, d)) if grad_rows is None else None
    config, row_config = _tile_config(n), _row_config(d)
    gradient = tiles.factor(factor_dtype)
    common = None  # to all centers, from the sum of all cosines
    if grad_cosine_sum.numel() > 0:
        common = ((grad_cosine_sum * input_r) @ input.double()).float()
    for start, own, _, weight_r in tiles:
        count = own.shape[0]
        columns = count // tiles.sub_centers
        grid = (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(columns, config["BLOCK_C"]))
        launch(
            kernels._tile_gradient_kernel, grid,
            tiles.logits, gradient, labels, target_rows, input_r,
            weight_r, negative_lse, inputs.grad_negative_lse, inputs.grad_target_cosine, n, columns,
            tiles.stride, start, inputs.scale, inputs.limit, K=labels.shape[1], M=tiles.sub_centers,
            FILTER=inputs.limit < math.inf, **config,
        )  # fmt: skip
        first = start * tiles.sub_centers
        if tile_rows is not None:
            out = tile_rows[:count]
        elif grad_rows is not None:
            out = grad_rows[first : first + count]
        a = mm(gradient[:, :count].t(), x, out if sums is None else sums[:count])
        if common is not None:
            a += common
        launch(
            kernels._grad_weight_kernel, (triton.cdiv(count, row_config["BLOCK_R"]),),
            own, weight_r, a, out, count, own.stride(0), D=d, **row_config,
        )  # fmt: skip
        if on_grad_tile is not None:
            on_grad_tile(start, out)


# ---- tiles ---------------------------------------------------------------------------------------


class _Tiles:
    """Tiles of classes with their logits, in buffers that serve one tile after the other.

    A tile has ``classes`` of ``sub_centers`` each, ``stride`` columns of logits together.
    """

    def __init__(
        self, inputs: ForwardInputs | BackwardInputs, gemm_dtype: torch.dtype, bytes_per_center: int
    ) -> None:
        self.input, self.weight = inputs.input.to(gemm_dtype), inputs.weight
        self.class_ids = inputs.class_ids
        self.sub_centers = _sub_centers(self.weight)
        self.count = count_classes(self.weight, self.class_ids)
        self.classes = _tile_classes(self.count, self.sub_centers * bytes_per_center)
        self.stride = self.classes * self.sub_centers
        new = torch.empty(
            (len(self.input) + 1, self.stride), dtype=torch.float32, device=self.input.device
        )
        self.logits, self.weight_r = new[:-1], new[-1]

    def factor(self, dtype: torch.dtype) -> Tensor:
        """Return a buffer for the next GEMM's operand: the logits' own if the dtype allows."""
        return self.logits if dtype == torch.float32 else torch.empty_like(self.logits, dtype=dtype)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (first class, its centers, the same in the GEMM's dtype, inverse norms)."""
        for start in range(0, self.count, self.classes):
            end = start + self.classes
            if self.class_ids is None:
                own = _centers(self.weight[start:end])
            else:
                own = _centers(self.weight.index_select(0, self.class_ids[start:end]))
            _inverse_norms(own, self.weight_r)
            rows = own.to(self.input.dtype)
            mm(self.input, rows.t(), self.logits[:, : rows.shape[0]])
            yield start, own, rows, self.weight_r


def _sub_centers(weight: Tensor) -> int:
    return weight.shape[1] if weight.dim() == 3 else 1


def _centers(weight: Tensor) -> Tensor:
    """Return all centers (C·M, D), one class's after the other."""
    return weight.flatten(0, 1) if weight.dim() == 3 else weight


def _inverse_norms(matrix: Tensor, out: Tensor) -> Tensor:
    count, d = matrix.shape
    config = _row_config(d)
    launch(
        kernels._inverse_norms_kernel, (triton.cdiv(count, config["BLOCK_R"]),),
        matrix, out, count, matrix.stride(0), D=d, **config,
    )  # fmt: skip
    return out


_Inputs = TypeVar("_Inputs", ForwardInputs, BackwardInputs)


def _with_contiguous_rows(inputs: _Inputs) -> _Inputs:
    """Return inputs whose rows are contiguous, copied if need be; raise ValueError for float64."""
    input, weight = inputs.input, inputs.weight
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16 for impl='triton', "
                f"got {tensor.dtype}: take impl='cpu' or impl='reference'"
            )
    input = input if input.stride(1) == 1 else input.contiguous()
    if weight.stride(-1) != 1 or (
        weight.dim() == 3 and weight.stride(0) != weight.shape[1] * weight.stride(1)
    ):
        weight = weight.contiguous()
    return inputs._replace(input=input, weight=weight, labels=inputs.labels.contiguous())


def _gemm_dtypes(input: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the logits GEMM and of the GEMM by probabilities or gradients.

    The latter leave float16's range, so their GEMM is float32 for float16 inputs.
    """
    gemm_dtype = input.dtype if input.dtype == weight.dtype else torch.float32
    return gemm_dtype, torch.float32 if gemm_dtype == torch.float16 else gemm_dtype


def _bytes_per_center(input: Tensor, weight: Tensor, class_ids: Tensor | None) -> int:
    """Return a center's bytes in a tile: logits, inverse norm, next operand, copies of its row."""
    n, d = input.shape
    gemm_dtype, factor_dtype = _gemm_dtypes(input, weight)
    copies = gemm_dtype.itemsize if gemm_dtype != weight.dtype else 0
    copies += factor_dtype.itemsize if factor_dtype != gemm_dtype else 0
    copies += weight.itemsize if class_ids is not None else 0
    factor = 0 if factor_dtype == torch.float32 else factor_dtype.itemsize
    return 4 * (n + 1) + factor * n + copies * d


def _float32_precision() -> str:
    """Return the precision of torch's own float32 GEMMs, as `tl.dot` names it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _properties(device: torch.device) -> tuple[int, int]:
    """Return the compute capability times ten, and the number of multiprocessors."""
    if device.type != "cuda":  # the interpreter
        return 80, 1
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
