"""Launchers of the margin softmax's Triton kernels, and their default configurations.

Forward computes log-sum-exps alone. Backward goes through the classes in tiles: the gradient
factor F of a tile is written to a workspace, and both gradients are GEMMs with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from .._triton import GRID_LIMITS, chip_of, launch, mm, round_up
from ..row_update import kernel_triton as row_update
from . import kernel_triton as kernels
from .config_triton import (
    TILE_ALIGNMENT,
    Gemms,
    Programs,
    block_config,
    choose_gemms,
    class_splits,
    grad_weight_config,
    one_row_config,
    row_config,
    tile_classes,
)
from .interface import (
    BackwardInputs,
    ForwardInputs,
    ForwardOutputs,
    OptimizerStep,
    count_classes,
)
from .operands_triton import (
    Rows,
    Tile,
    Tiles,
    as_rows,
    centers_of,
    sub_centers_of,
)

# Takes the weight's gradient a tile at a time: the first class, and rows (·, D) that the next tile
# overwrites.
GradTileCallback = Callable[[int, Tensor], None]

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


# ---- forward -------------------------------------------------------------------------------------


def forward(inputs: ForwardInputs, *, gemm_dtype: torch.dtype | None = None) -> ForwardOutputs:
    """Return statistics of the classes that are not a row's labels.

    Args:
        inputs: float32, bfloat16 or float16 matrices on one CUDA device (or on the CPU in Triton's
            interpreter). Where their dtypes differ, both are taken as float32.
        gemm_dtype: autocast's dtype: operands of other dtypes are normalized and rounded to it.

    Returns:
        negative_max in float32, the others in float64, though log-sum-exps are computed in float32.
        No mean center and no center sum: the input's gradient is computed in the backward pass.
        ``saved`` has the (S·M,) centers' inverse norms in float32.

    Memory above inputs and outputs, in bytes:
        8·N·(splits + 1), splits ≤ ⌈4·SMs/⌈N/128⌉⌉; for class_ids and where weight is not in the
        GEMMs' dtype a tile of at most max(80 MiB, 128 classes), which in
        the tiled design also has 4·N per center. An input or weight whose rows are not contiguous
        is copied.

    Raises:
        ValueError: for float64, which has no kernel here.
    """
    inputs = _with_contiguous_rows(inputs)
    input, weight, labels = inputs.input, inputs.weight, inputs.labels
    n, filters, sums = input.shape[0], inputs.limit < math.inf, inputs.needs_cosine_sum
    count, m = count_classes(weight, inputs.class_ids), sub_centers_of(weight)
    new = input.new_empty
    norms = new(count * m, dtype=torch.float32)
    target_cosine = new(labels.shape, dtype=torch.float64)

    def none(dtype: torch.dtype = torch.float64) -> Tensor:
        # Each output is a tensor of its own: no op may return one twice.
        return new(0, dtype=dtype)

    if n == 0:
        return ForwardOutputs(
            negative_lse=none(),
            negative_max=none(torch.float32),
            target_cosine=target_cosine,
            filtered=none(),
            cosine_sum=none(),
            mean_center=none(torch.float32),
            center_sum=none(),
            saved=norms.zero_(),
        )
    find_targets(inputs, target_cosine)
    gemms = choose_gemms(input.dtype, weight.dtype, gemm_dtype)
    found = _Statistics(inputs, gemms)
    for tile in Tiles(
        weight, inputs.class_ids, gemms, norms, found.classes, write_norms=True, for_gradient=False
    ):
        found.add(tile)

    negative_max = found.maximum.amax(0)
    shift = torch.where(negative_max == -torch.inf, 0, negative_max)
    total = (found.total * torch.exp(inputs.scale * (found.maximum - shift))).sum(0)
    negative_lse = inputs.scale * shift + torch.log(total)
    # The hardware's maximum skips a NaN, the sum does not.
    negative_max = torch.where(negative_lse.isnan(), torch.nan, negative_max)
    valid = (labels != -1).any(1)
    return ForwardOutputs(
        negative_lse=torch.where(valid, negative_lse, 0).double(),
        negative_max=torch.where(valid, negative_max, 0),
        target_cosine=target_cosine,
        filtered=torch.where(valid, found.filtered.sum(0).double(), 0) if filters else none(),
        cosine_sum=torch.where(valid, found.cosine_sum.double().sum(0), 0) if sums else none(),
        mean_center=none(torch.float32),
        center_sum=none(),
        saved=norms,
    )


def find_targets(
    inputs: ForwardInputs | BackwardInputs, target_cosine: Tensor | None = None
) -> Tensor:
    """Fill target_cosine (N, K), if given; return each label's row of centers (C·M, D).

    A negative label is returned as it is.
    """
    labels, class_ids = inputs.labels, inputs.class_ids
    n, d = inputs.input.shape
    centers = centers_of(inputs.weight)
    classes = labels
    if class_ids is not None:
        classes = torch.where(labels >= 0, class_ids[labels.clamp_min(0)], labels)
    if target_cosine is None:
        if sub_centers_of(inputs.weight) == 1:
            return classes
        target_cosine = torch.empty_like(labels, dtype=torch.float64)
    target_rows = torch.empty_like(labels)
    launch(
        kernels._target_cosines_kernel, (n,),
        inputs.input, centers, classes, target_cosine, target_rows,
        inputs.input.stride(0), centers.stride(0), D=d, K=labels.shape[1],
        M=sub_centers_of(inputs.weight), **one_row_config(d),
    )  # fmt: skip
    return target_rows


class _Pass:
    """Sizes, options and blocks that both passes give the kernels that take logits."""

    rows: Rows
    products: Tensor

    def __init__(self, inputs: ForwardInputs | BackwardInputs, gemms: Gemms, sums: bool) -> None:
        input, k = inputs.input, inputs.labels.shape[1]
        self.gemms, self.chip = gemms, chip_of(input.device)
        (self.n, self.d), self.m = input.shape, sub_centers_of(inputs.weight)
        self.filters, self.sums = inputs.limit < math.inf, sums
        self.options: dict[str, Any] = {
            "D": self.d, "K": k, "M": self.m, "FILTER": self.filters, "SUM": sums,
            "FUSED": gemms.fused, "PRECISION": gemms.precision,
        }  # fmt: skip
        plain = k == 1 and not (self.filters or sums)
        self.config = block_config(gemms, self.n, self.m, plain, self.chip)
        self.block = self.config["H"] * self.config["BLOCK_C"]
        self.row_blocks = triton.cdiv(self.n, self.config["BLOCK_N"])

    def multiply(self, tile: Tile) -> None:
        """Compute a tile's dot products by cuBLAS, unless the kernels do."""
        if not self.gemms.fused:
            mm(self.rows.gemm, tile.gemm.t(), self.products[:, : len(tile.gemm)])


class _Statistics(_Pass):
    """Statistics of all rows, also of those without labels, (splits, N) each, summed by tiles."""

    def __init__(self, inputs: ForwardInputs, gemms: Gemms) -> None:
        super().__init__(inputs, gemms, sums=inputs.needs_cosine_sum)
        self.inputs, self.rows = inputs, as_rows(inputs.input, gemms, for_gradient=False)
        count = count_classes(inputs.weight, inputs.class_ids)
        per_center = Tiles.bytes_per_center(inputs.weight, inputs.class_ids, gemms, False)
        per_center += 0 if gemms.fused else 4 * self.n
        self.classes = count
        if per_center > 0:
            self.classes = tile_classes(count, self.m * per_center, TILE_ALIGNMENT, None, self.chip)
        blocks = triton.cdiv(self.classes, self.block)
        splits = class_splits(blocks, self.row_blocks, self.chip)
        self.per_split = triton.cdiv(blocks, splits) * self.block
        shape = (triton.cdiv(self.classes, self.per_split), self.n)
        new, none = self.rows.scale.new_full, (0,)
        self.maximum, self.total = new(shape, -torch.inf), new(shape, 0)
        self.filtered = new(shape if self.filters else none, 0, dtype=torch.int32)
        self.cosine_sum = new(shape if self.sums else none, 0)
        products = none if gemms.fused else (self.n, self.classes * self.m)
        self.products = self.rows.scale.new_empty(products)

    def add(self, tile: Tile) -> None:
        """Add a tile's classes."""
        rows, inputs, products = self.rows, self.inputs, self.products
        self.multiply(tile)
        launch(
            kernels._lse_kernel, (self.row_blocks, triton.cdiv(tile.columns, self.per_split)),
            rows.gemm, tile.gemm, products, inputs.labels, rows.scale, tile.scale, self.maximum,
            self.total, self.filtered, self.cosine_sum, self.n, tile.columns, self.per_split,
            rows.gemm.stride(0), tile.gemm.stride(0), products.stride(0), tile.start, inputs.scale,
            inputs.limit, **self.options, **self.config,
        )  # fmt: skip


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
        inputs: as in `forward`. The outputs' float64 gradients are taken in float32.
        needs_weight_grad: whether to return the weight's gradient.
        on_grad_tile: is given the weight's gradient, a tile at a time, instead.
        gemm_dtype: the forward pass's.

    Returns:
        grad_input (N, D) in input's dtype, grad_rows (S, D) or (S, M, D) in weight's dtype; (0,)
        for one that is not needed. Rows without labels, or whose three gradients are all 0, give
        and get no gradient, even if they hold NaN.

    Memory above the gradients, in bytes:
        at most max(80 MiB, 128 classes) of tile, at N·(2, or 4 for
        float32) per center, and what copies of its rows take; 4·N more in the tiled design; 4·N·D
        for the input's gradient, and two copies of the input.

    Raises:
        ValueError: for float64, which has no kernel here.
    """
    inputs = _with_contiguous_rows(inputs)
    input, weight = inputs.input, inputs.weight
    grad_input = input.new_empty(input.shape if inputs.needs_input_grad else 0)
    shape = (count_classes(weight, inputs.class_ids), *weight.shape[1:])
    grad_rows = weight.new_empty(shape if needs_weight_grad else 0)
    if len(input) == 0:
        return grad_input, grad_rows.zero_()
    if inputs.needs_input_grad or needs_weight_grad or on_grad_tile is not None:
        step = _Gradients(inputs, choose_gemms(input.dtype, weight.dtype, gemm_dtype))
        step.run(
            grad_input if inputs.needs_input_grad else None,
            centers_of(grad_rows) if needs_weight_grad else None,
            on_grad_tile,
        )
    return grad_input, grad_rows


def update(
    inputs: BackwardInputs, step: OptimizerStep, *, gemm_dtype: torch.dtype | None = None
) -> Tensor:
    """Compute the gradients, and take an optimizer's step on the centers a tile at a time.

    Args:
        inputs: as in `backward`; the weight has contiguous rows, and is written.
        step: its states are (C, M·D).
        gemm_dtype: the forward pass's.

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
    return backward(inputs, False, step_tile, gemm_dtype=gemm_dtype)[0]


class _Gradients(_Pass):
    """The gradients of one step, summed by tiles of classes."""

    def __init__(self, inputs: BackwardInputs, gemms: Gemms) -> None:
        super().__init__(inputs, gemms, sums=inputs.grad_cosine_sum.numel() > 0)
        self.inputs = inputs
        # A rounded center is not quite along its row, to whose tangent a kernel of whole rows
        # projects after cuBLAS.
        self.fused_grad = gemms.fused and not gemms.unit_weight
        self.grad_weight_config = grad_weight_config(
            gemms, self.config["BLOCK_N"], self.d, self.chip
        )
        self.target_rows = find_targets(inputs)

        # A row without labels, or with zero gradients only, may hold NaN, as may the gradients of
        # one without labels: none of it must reach the sums over rows.
        grads = inputs.grad_negative_lse, inputs.grad_target_cosine, inputs.grad_cosine_sum
        by_lse, by_target, by_sum = (grad.float() for grad in grads)
        has_grad = (by_lse != 0) | (by_target != 0).any(1)
        if self.sums:
            has_grad |= by_sum != 0
        has_grad &= (inputs.labels != -1).any(1)
        # exp(logit − ∞) is 0 at any scale: where the softmax is empty, or its gradient is 0.
        in_softmax = has_grad & (by_lse != 0) & (inputs.negative_lse != -math.inf)
        self.negative_lse = torch.where(in_softmax, inputs.negative_lse.float(), math.inf)
        self.input = torch.where(has_grad[:, None], inputs.input, 0)
        self.rows = as_rows(self.input, gemms, for_gradient=True)

        by_lse = by_lse * inputs.scale
        self.has_grad = has_grad.to(torch.int32)
        self.unit_sums = gemms.plain or gemms.unit_input
        most = by_lse.abs().maximum(by_target.abs().amax(1))
        if self.sums:
            most = most + by_sum.abs()
        factor_scale = self.factor_scale = self._scale_for(torch.where(has_grad, most, 0))
        self.unscale = 1 / factor_scale
        self.grad_lse = torch.where(has_grad, by_lse, 0) * factor_scale
        if self.sums:
            by_sum = torch.where(has_grad, by_sum, 0)
        self.grad_sum = by_sum * factor_scale
        self.grad_target = (by_target * factor_scale).contiguous()

    def _scale_for(self, most: Tensor) -> Tensor:
        """Return a power of two (1,) for the factor, whose largest element then is at most 2^14.

        float16 needs it, and so do long rows, whose inverse norms are factors. ``most`` (N,) bounds
        the rows' gradients by cosines.
        """
        if not self.gemms.plain:
            most = most * self.rows.scale
        largest = most.amax(0, keepdim=True)
        if not (self.gemms.plain or self.gemms.unit_weight):
            largest = largest * self.inputs.saved.amax(0, keepdim=True)
        exponent = 14 - torch.frexp(largest).exponent
        exponent = torch.where((largest > 0) & largest.isfinite(), exponent, 0)
        return torch.exp2(exponent.clamp(-100, 100).float())

    def run(
        self,
        grad_input: Tensor | None,
        grad_rows: Tensor | None,
        on_grad_tile: GradTileCallback | None,
    ) -> None:
        """Compute both gradients, grad_rows (S·M, D) or else for the callback."""
        inputs, gemms, n, d, m = self.inputs, self.gemms, self.n, self.d, self.m
        weight, for_weight = inputs.weight, grad_rows is not None or on_grad_tile is not None
        for_input = grad_input is not None
        per_center = Tiles.bytes_per_center(weight, inputs.class_ids, gemms, for_input)
        whole_blocks = round_up(n, self.config["BLOCK_N"])
        per_center += whole_blocks * gemms.dtype.itemsize
        # In the tiled design the dot products, and the GEMM's float32 rows.
        in_place = weight.dtype == torch.float32
        center_sums = for_weight and self.fused_grad
        per_center += 4 * self.row_blocks if center_sums else 0
        per_center += 0 if gemms.fused or gemms.dtype == torch.float32 else 4 * n
        per_center += 0 if self.fused_grad or in_place else 4 * d
        per_center += 0 if on_grad_tile is None else weight.itemsize * d
        quantum = round_up(TILE_ALIGNMENT, self.block) if gemms.fused else TILE_ALIGNMENT
        count = count_classes(weight, inputs.class_ids)
        most = GRID_LIMITS[1] * self.block // quantum * quantum
        classes = tile_classes(min(count, most), m * per_center, quantum, self._programs, self.chip)
        tiles = Tiles(
            weight, inputs.class_ids, gemms, inputs.saved, classes,
            write_norms=False, for_gradient=for_input,
        )  # fmt: skip

        new, stride = self.rows.norms.new_empty, tiles.stride
        self.products = new(0 if gemms.fused else (n, stride))
        self.factor = self.products
        if gemms.fused or gemms.dtype != torch.float32:
            self.factor = new((whole_blocks, stride), dtype=gemms.dtype)
        self.center_sums = new((self.row_blocks, stride) if center_sums else 0)
        self.sums_of_rows = new(0 if self.fused_grad or in_place else (stride, d))
        tile_rows = weight.new_empty(0 if on_grad_tile is None else (stride, d))
        sums = self._target_gradients() if for_input else None
        for tile in tiles:
            centers = len(tile.gemm)
            self._write_factor(tile)
            if for_weight:
                first = tile.start * m
                out = tile_rows[:centers]
                if grad_rows is not None:
                    out = grad_rows[first : first + centers]
                self._grad_by_centers(tile, out)
            if sums is not None:
                self._clear_targets(tile)
                mm(self.factor[:n, :centers], tile.gradient, sums, accumulate=True)
            if on_grad_tile is not None:
                on_grad_tile(tile.start, out)
        if grad_input is not None:
            assert sums is not None
            self._grad_by_input(sums, grad_input)

    @property
    def _programs(self) -> Programs | None:
        if not self.gemms.fused:
            return None
        return Programs(
            row_blocks=self.row_blocks,
            block=self.block,
            sub_centers=self.m,
            center_block=self.grad_weight_config["BLOCK_C"],
            width_blocks=self._grad_weight_grid(0)[1] if self.fused_grad else 0,
        )

    def _grad_weight_grid(self, centers: int) -> tuple[int, int]:
        config = self.grad_weight_config
        width = config["H"] * config["BLOCK_D"]
        return triton.cdiv(centers, config["BLOCK_C"]), triton.cdiv(self.d, width)

    def _write_factor(self, tile: Tile) -> None:
        inputs, rows = self.inputs, self.rows
        self.multiply(tile)
        launch(
            kernels._factor_kernel, (self.row_blocks, triton.cdiv(tile.columns, self.block)),
            rows.gemm, tile.gemm, self.products, inputs.labels, self.target_rows, rows.scale,
            tile.scale, self.negative_lse, self.grad_lse, self.grad_target, self.grad_sum,
            self.factor, self.center_sums, self.n, tile.columns, rows.gemm.stride(0),
            tile.gemm.stride(0), self.factor.stride(0), tile.start, inputs.scale, inputs.limit,
            PLAIN=self.gemms.plain, CENTER_SUMS=len(self.center_sums) > 0, **self.options,
            **self.config,
        )  # fmt: skip

    def _clear_targets(self, tile: Tile) -> None:
        block_n = 128
        launch(
            kernels._clear_targets_kernel, (triton.cdiv(self.n, block_n),),
            self.factor, self.inputs.labels, self.target_rows, self.rows.scale, tile.scale,
            self.grad_sum, self.n, tile.columns, self.factor.stride(0), tile.start,
            K=self.inputs.labels.shape[1], M=self.m, SUM=self.sums, PLAIN=self.gemms.plain,
            BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip

    def _grad_by_centers(self, tile: Tile, out: Tensor) -> None:
        gemms, rows, n, d = self.gemms, self.rows, self.n, self.d
        centers, stride = len(tile.gemm), self.factor.stride(0)
        ids = tile.centers if tile.ids is None else tile.ids
        own: dict[str, Any] = {
            "D": d, "M": self.m, "IDS": tile.ids is not None,
            "UNIT": gemms.plain or gemms.unit_weight,
        }  # fmt: skip
        if self.fused_grad:
            launch(
                kernels._grad_weight_kernel, self._grad_weight_grid(centers),
                self.factor, rows.gradient, tile.centers, ids, tile.norms, self.center_sums,
                self.unscale, out, n, centers, self.row_blocks, stride, rows.gradient.stride(0),
                tile.centers.stride(0), PRECISION=gemms.precision,
                ROWS=n if out.device.type == "cpu" else None, **own, **self.grad_weight_config,
            )  # fmt: skip
            return
        product = self.sums_of_rows[:centers] if len(self.sums_of_rows) else out
        mm(self.factor[:n, :centers].t(), rows.gradient, product)
        config = row_config(d)
        launch(
            kernels._project_rows_kernel, (triton.cdiv(centers, config["BLOCK_R"]),),
            tile.centers, ids, tile.norms, product, self.unscale, out, centers,
            tile.centers.stride(0), **own, **config,
        )  # fmt: skip

    def _target_gradients(self) -> Tensor:
        """Return the labels' part of the sums for the input's gradient, before an update."""
        inputs, centers = self.inputs, centers_of(self.inputs.weight)
        sums = self.rows.norms.new_empty((self.n, self.d))
        launch(
            kernels._target_gradients_kernel, (self.n,),
            self.input, centers, self.target_rows, self.rows.norms, self.factor_scale,
            inputs.grad_target_cosine.contiguous(), self.has_grad, sums, self.input.stride(0),
            centers.stride(0), D=self.d, K=inputs.labels.shape[1], UNIT=self.unit_sums,
            **one_row_config(self.d),
        )  # fmt: skip
        return sums

    def _grad_by_input(self, sums: Tensor, grad_input: Tensor) -> None:
        launch(
            kernels._grad_input_kernel, (self.n,),
            self.input, self.rows.norms, sums, self.unscale, self.has_grad, grad_input,
            self.input.stride(0), D=self.d, UNIT=self.unit_sums, **one_row_config(self.d),
        )  # fmt: skip
