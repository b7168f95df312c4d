"""A tensor elsewhere than the first, or a sparse one, is an error that names it and what it is."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk

N, C, D = 4, 9, 8
IDS = torch.arange(0, C, 2)


def rows(*shape: int) -> Tensor:
    return torch.ones(shape)


MARGIN = {
    "input": rows(N, D),
    "weight": rows(C, D),
    "target": torch.zeros(N, 2, dtype=torch.int64),
    "target_weight": torch.full((N, 2), 0.5),
    "class_ids": IDS,
}
UPDATED = {
    "weight": rows(C, D),
    "row_grad": rows(5, D),
    "class_ids": IDS,
    "last_step": torch.zeros(C, dtype=torch.int64),
}
IMAGES = {"synthetic": rows(2, 4, 4, 3), "real": rows(2, 4, 4, 3)}


def margin(m2: Tensor, input: Tensor) -> Any:
    weight, target = rows(C, D), torch.zeros(N, dtype=torch.int64)
    return sk.margin_cross_entropy(input, weight, target, margin=sk.CombinedMargin(m2=m2))


def update(input: Tensor, weight: Tensor, momentum_buffer: Tensor, last_step: Tensor) -> Any:
    own = sk.SGDUpdate(
        lr=0.1, momentum=0.9, momentum_buffer=momentum_buffer, step=1, last_step=last_step
    )
    target = torch.zeros(N, dtype=torch.int64)
    return sk.margin_cross_entropy(input, weight, target, update=own)


def mixup(flip_synthetic: Tensor, flip_real: Tensor, **options: Any) -> Any:
    return sk.domain_mixup(flip=(flip_synthetic, flip_real), **options)


FLIPS = {"flip_synthetic": torch.ones(2).bool(), "flip_real": torch.ones(2).bool()}
STATES = {"momentum_buffer": rows(C, D), "last_step": UPDATED["last_step"]}
# The op, its tensors (the first decides the device), and its other arguments.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]] = {
    "margin_cross_entropy": (sk.margin_cross_entropy, MARGIN, {}),
    "margin per row": (margin, {"input": rows(N, D), "m2": torch.full((N,), 0.5)}, {}),
    "update": (update, {"input": rows(N, D), "weight": rows(C, D), **STATES}, {}),
    "row_sgd_": (
        sk.row_sgd_, UPDATED | {"momentum_buffer": rows(C, D)},
        {"lr": 0.1, "step": 1, "momentum": 0.9},
    ),
    "row_adamw_": (
        sk.row_adamw_, UPDATED | {"exp_avg": rows(C, D), "exp_avg_sq": rows(C, D)}, {"step": 1}
    ),
    "domain_mixup": (
        mixup, IMAGES | {"psi": torch.full((2,), 0.5), "out": rows(2, 3, 4, 4)} | FLIPS, {}
    ),
    "identity_mixup": (
        sk.identity_mixup,
        {"alpha1": rows(N, D), "alpha2": rows(N, D), "phi": torch.full((N,), 0.5)}, {},
    ),
    "hypersphere_repulsion": (
        sk.hypersphere_repulsion, {"x": rows(N, D), "y": rows(C, D)}, {}
    ),
    "nearest_neighbors": (sk.nearest_neighbors, {"x": rows(N, D), "y": rows(C, D)}, {}),
}  # fmt: skip
CASES = [(call, name) for call, (_, tensors, _) in CALLS.items() for name in [*tensors][1:]]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_a_tensor_elsewhere_is_named_with_both_devices(call: str, name: str) -> None:
    op, tensors, others = CALLS[call]
    moved = tensors | {name: tensors[name].to("meta")}
    with pytest.raises(ValueError, match=rf"\b{name}\b") as raised:
        op(**moved, **others)
    message = str(raised.value)
    assert re.search(r"\bmeta\b", message), message
    assert re.search(r"\bcpu\b", message), message


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, (_, tensors, _) in CALLS.items() for name in tensors]
)
def test_a_sparse_or_nested_tensor_is_named(call: str, name: str) -> None:
    op, tensors, others = CALLS[call]
    nested = torch.nested.as_nested_tensor([tensors[name]])
    for wrong, kind in ((tensors[name].to_sparse(), "sparse_coo"), (nested, "nested")):
        match = rf"\b{name}\b.* got {kind} .*not dense"
        with pytest.raises((TypeError, ValueError), match=match):
            op(**(tensors | {name: wrong}), **others)
