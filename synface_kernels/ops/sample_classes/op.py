"""Class sampling: checks, registrations, the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._check import capturing, describe, integer, is_dense, require
from ..._distributed import check_group, gather_rows, validate_on_all_ranks
from ..._load import library
from ..._select import always, needs_cpu_extension, register, resolve
from . import kernel_torch, reference

OP = "sample_classes"
OTHER_RANKS = -1  # marks labels that are not among this rank's classes
register(OP, {"cpu": needs_cpu_extension, "torch": always, "reference": always})

_RESULT = " -> (Tensor class_ids, Tensor remapped)"
library.define(
    f"{OP}_draw(Tensor target, SymInt num_classes, SymInt num_sampled, Tensor seed, "
    f"int ignore_index, str impl){_RESULT}"
)
library.define(  # implemented in csrc/
    f"{OP}_cpu(Tensor target, int num_classes, int num_sampled, int seed, int ignore_index)"
    + _RESULT
)


def sample_classes(
    target: Tensor,
    num_classes: int,
    num_sampled: int,
    generator: torch.Generator | None = None,
    *,
    group: Any = None,
    class_start: int = 0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample the classes of a training step: all positives, and random negatives.

    The negatives are drawn uniformly, without replacement, from the classes that are not positives.
    They are a function of one number from the generator: the same on every device, by every
    implementation and for any number of threads.

    Args:
        target: (N,) or (N, K) int64 labels in [0, num_classes), or ``ignore_index``.
        num_classes: C, 1 ≤ C < 2^31.
        num_sampled: how many classes to sample, in [1, C]. Where the target holds more distinct
            positives than that, exactly these are sampled.
        generator: the source of the random number. Default: torch's of the target's device.
        group, class_start: for classes that are sharded over the ranks of a `torch.distributed`
            process group, see `margin_cross_entropy`: each rank samples from its own classes,
            num_classes of them from class_start on, and includes the positives of all ranks. The
            labels, in [0, number of all ranks' classes), are gathered: 8·N·K bytes. All ranks must
            call this.
        ignore_index: a label that is not a class; it remains in the returned target. Without a
            group it must be outside [0, num_classes), or another label's index could equal it.
        impl: ``"auto"``, ``"cpu"``, ``"torch"`` or ``"reference"``; see `explain`.

    Returns:
        The pair (class_ids, target): class_ids (S,) int64, strictly increasing, with
        S = max(num_sampled, number of distinct positives), and the target with each label replaced
        by its index in class_ids. With a group class_ids are row indices of this rank's weight, and
        the target is returned unchanged, as `margin_cross_entropy` takes it.

    Time: O(N·K·log S + S), and one pass over a bit per class on the CPU. On a GPU a few operations
    on S elements, sorting among them, without synchronization unless ``num_sampled`` is less than
    N·K: then S depends on the labels. Between C/2 and (C + N·K)/2 they take twice the time. A CUDA
    graph can capture them with a generator of the GPU, without a group.

    Memory above the results: on the CPU one bit per class; else O(S + N·K).

    Raises:
        ValueError: for a wrong dtype, shape or value; labels on a GPU are checked by an
            asynchronous assertion.
        TypeError: for an argument of a wrong Python type.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason; while a CUDA graph is
            captured, for a generator of the CPU, ``num_sampled`` below N·K, and a group.

    Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
    Recognition CNNs by Partial FC", CVPR 2022. SplitMix64: Steele et al., OOPSLA 2014.
    """

    def check() -> int:
        nonlocal num_classes, num_sampled, class_start, ignore_index
        if not is_dense(target):
            raise TypeError(f"target must be a tensor, got {describe(target)}")
        if target.dtype != torch.int64 or target.dim() not in (1, 2):
            raise ValueError(
                f"target must be int64 of shape (N,) or (N, K), got {describe(target)}"
            )
        num_classes, num_sampled, class_start, ignore_index = (
            integer(name, value, -(2**63))
            for name, value in (
                ("num_classes", num_classes),
                ("num_sampled", num_sampled),
                ("class_start", class_start),
                ("ignore_index", ignore_index),
            )
        )
        if not 1 <= num_classes < 2**31:
            raise ValueError(f"num_classes must be in [1, 2^31), got {num_classes}")
        if not 1 <= num_sampled <= num_classes:
            raise ValueError(
                f"num_sampled must be in [1, {num_classes}] (num_classes), got {num_sampled}"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {describe(generator)}")
        device = target.device if generator is None else generator.device
        if device.type != "cpu" and device != target.device:
            raise ValueError(
                f"generator must be on the CPU or on target's device {target.device}, got {device}"
            )
        if capturing(target):
            _check_capture(target, num_sampled, device, group)
        if class_start < 0:
            raise ValueError(f"class_start must not be negative, got {class_start}")
        return target.numel()

    if group is None:
        check()
        labels = target
        if class_start != 0:
            raise ValueError(f"class_start must be 0 without a group, got {class_start}")
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index must not be a class, in [0, {num_classes}) (num_classes), got "
                f"{ignore_index}: the index that replaces another label could equal it"
            )
    else:
        check_group(group)
        # This rank ignores labels of other ranks' classes.
        counts = [count for (count,) in validate_on_all_ranks(lambda: ([check()], {}), 1, group)]
        labels = gather_rows(target.flatten(), counts, group)
        here = (labels >= class_start) & (labels < class_start + num_classes)
        here &= labels != ignore_index
        labels = torch.where(here, labels - class_start, OTHER_RANKS)
    chosen = resolve(OP, impl, (target,))
    device = target.device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    if seed.device != target.device:  # an argument of a kernel: nothing is copied
        seed = torch.full((), int(seed), dtype=torch.int64, device=target.device)
    class_ids, remapped = torch.ops.synface_kernels.sample_classes_draw(
        labels,
        num_classes,
        num_sampled,
        seed,
        ignore_index if group is None else OTHER_RANKS,
        chosen,
    )
    return class_ids, remapped if group is None else target


def _check_capture(target: Tensor, num_sampled: int, device: torch.device, group: Any) -> None:
    """Raise RuntimeError for a call that a replayed CUDA graph would not repeat."""
    if group is not None:
        raise RuntimeError(
            "group must be None while a CUDA graph is captured: with it the ranks' arguments are "
            "compared on the host"
        )
    if device != target.device:
        raise RuntimeError(
            f"generator must be on target's device {target.device}, got one on {device}, while a "
            "CUDA graph is captured: each replay would sample the same classes"
        )
    if num_sampled < target.numel():
        raise RuntimeError(
            f"num_sampled must be at least {target.numel()}, the number of labels, got "
            f"{num_sampled}, while a CUDA graph is captured: the number of sampled classes would "
            "depend on the labels"
        )


def _draw(
    target: Tensor, num_classes: int, num_sampled: int, seed: Tensor, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor]:
    valid = (target == ignore_index) | ((target >= 0) & (target < num_classes))
    message = f"target must be in [0, {num_classes}) or ignore_index ({ignore_index})"
    require(valid, message, target)
    target = target.contiguous()
    if impl == "torch":
        return kernel_torch.sample(target, num_classes, num_sampled, seed, ignore_index)
    draw = (
        reference.sample_classes
        if impl == "reference"
        else torch.ops.synface_kernels.sample_classes_cpu
    )
    return draw(target, num_classes, num_sampled, int(seed), ignore_index)


for _key in ("CPU", "CUDA"):
    library.impl(f"{OP}_draw", _draw, _key)


@torch.library.register_fake(f"synface_kernels::{OP}_draw")
def _draw_fake(
    target: Tensor, num_classes: int, num_sampled: int, seed: Tensor, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor]:
    size: int | torch.SymInt = num_sampled
    if num_sampled < target.numel():  # there may be more positives
        # a least size, for checks that there are any classes to be traced
        size = torch.library.get_ctx().new_dynamic_size(min=1)
    return target.new_empty((size,)), target.new_empty(target.shape)
