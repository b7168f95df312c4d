"""Bad arguments of the margin softmax, and the choice of its implementation."""

from __future__ import annotations

import math

import pytest
import torch

import synface_kernels as sk
from synface_kernels.ops.margin_cross_entropy.interface import (
    BackwardInputs,
    ForwardInputs,
    ForwardOutputs,
    OptimizerStep,
)

X, W, T = torch.ones(4, 8), torch.ones(5, 8), torch.tensor([0, 1, 2, 3])
T2, TW = torch.tensor([[0, 1]] * 4), torch.tensor([[0.5, 0.5]] * 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, W, T.float()), {}, ValueError, r"target must be int64 .* got float32 \(4,\)"),
        ((X, W, T.int()), {}, ValueError, "got int32"),
        ((X, W, T[:3]), {}, ValueError, r"N = 4 .* got int64 \(3,\)"),
        ((X, W, T[:, None, None]), {}, ValueError, "target must be int64"),
        ((X, W, T2[:, :0]), {"target_weight": TW[:, :0]}, ValueError, "K ≥ 1"),
        ((X, W[:, :7], T), {}, ValueError, r"same D .*\(4, 8\).*\(5, 7\)"),
        ((X[0], W, T), {}, ValueError, r"input must be .* \(N, D\), got float32 \(8,\)"),
        ((X, W[None, None], T), {}, ValueError, r"weight must be"),
        ((X.int(), W, T), {}, ValueError, "input must be .* got int32"),
        ((X.double(), W, T), {}, ValueError, "both be float64"),
        ((X, W[:0], T), {}, ValueError, "at least one class"),
        ((X, W[:, None][:, :0], T), {}, ValueError, r"each class a center, got .*\(5, 0, 8\)"),
        ((X, W, T), {"label_smoothing": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ((X, W, T), {"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a float"),
        (
            (X, W, T, sk.ArcFace(interclass_filter=0.3)),
            {"label_smoothing": 0.1},
            ValueError,
            "what interclass_filter leaves out",
        ),
        ((X, W[:, None], T), {"label_smoothing": 0.1}, NotImplementedError, "for sub-centers"),
        ((X, W, torch.tensor([0, 1, 5, 2])), {}, ValueError, r"\[0, 5\).* got 5 at 2"),
        ((X, W, torch.tensor([0, -1, 0, 2])), {}, ValueError, "got -1 at 1"),
        ((X, W, T2), {}, ValueError, "target_weight .* is required"),
        ((X, W, T), {"target_weight": TW}, ValueError, "target_weight must be"),
        ((X, W, T2), {"target_weight": TW[:, :1]}, ValueError, "target_weight must be"),
        ((X, W, T2), {"target_weight": TW.long()}, ValueError, "floating point"),
        ((X, W, T2), {"target_weight": TW * 0.9}, ValueError, "sum to 1 .* got 0.89"),
        ((X, W, T2), {"target_weight": torch.tensor([[1.5, -0.5]] * 4)}, ValueError, "got -0.5"),
        ((X, W, T2), {"target_weight": TW * math.nan}, ValueError, "finite"),
        ((X, W, T2), {"target_weight": TW.clone().requires_grad_()}, ValueError, "no gradient"),
        ((X, W, T.to("meta")), {}, ValueError, "input's device cpu, got int64 .* on meta"),
        ((X, W, T, "arcface"), {}, TypeError, "margin must be .* got str"),
        ((X, W, [0, 1, 2, 3]), {}, TypeError, "target must be a tensor, got list"),
        ((X, W, T), {"reduction": "avg"}, ValueError, "reduction must be .* got 'avg'"),
        ((X, W, T), {"mix": "sum"}, ValueError, "mix must be"),
        ((X, W, T), {"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
        ((X, W, T), {"impl": "triton"}, RuntimeError, "impl='triton' .* cannot run here: runs on"),
        ((X, W, T), {"class_ids": [0, 1]}, TypeError, "class_ids must be a tensor, got list"),
        ((X, W, T), {"class_ids": T.int()}, ValueError, "class_ids must be int64 .* got int32"),
        (
            (X, W, T),
            {"class_ids": T[None]},
            ValueError,
            r"of shape \(S,\), S ≥ 1, got int64 \(1, 4",
        ),
        ((X, W, T), {"class_ids": T[:0]}, ValueError, "S ≥ 1, got int64"),
        ((X, W, T), {"class_ids": T.to("meta")}, ValueError, "class_ids must be on input's device"),
        ((X, W, T), {"class_ids": T + 2}, ValueError, r"class_ids must be in \[0, 5\), got 5 at 3"),
        ((X, W, T), {"class_ids": T - 1}, ValueError, "class_ids must be .* got -1 at 0"),
        ((X, W, T), {"class_ids": T.flip(0)}, ValueError, "class_ids must rise strictly, got 2"),
        ((X, W, T), {"class_ids": T // 2}, ValueError, "class_ids must rise strictly, got 0"),
        (
            (X, W, T),
            {"class_ids": T[:3]},
            ValueError,
            r"target must be in \[0, 3\), an index into class_ids, which must hold every label, .*"
            "got 3 at 3",
        ),
        ((X, W, T), {"group": object()}, TypeError, "group must be a .* process group, got object"),
        ((X, W, T), {"workspace": -1}, ValueError, "workspace must not be negative, got -1"),
        (
            (X, W, T),
            {"workspace": "all"},
            ValueError,
            "workspace must be \"auto\" or a number of bytes, got 'all'",
        ),
        ((X, W, T), {"workspace": 1e9}, TypeError, "workspace must be an int, got float"),
        ((X, W, T), {"workspace": True}, TypeError, "workspace must be an int, got bool"),
        ((X, W, T), {"class_start": 3}, ValueError, "class_start must be 0 without a group, got 3"),
        (
            (X, W, T, sk.ArcFace(margin=torch.zeros(3))),
            {},
            ValueError,
            r"shape \(4,\) .* got \(3,\)",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sk.margin_cross_entropy(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sk.ArcFace(margin=28.6), ValueError, "angle in radians .* got 28.6"),
        (lambda: sk.ArcFace(scale=0.0), ValueError, "scale must be finite and positive, got 0"),
        (lambda: sk.ArcFace(scale=math.inf), ValueError, "got inf"),
        (lambda: sk.ArcFace(scale="64"), TypeError, "scale must be a float, got str"),
        (lambda: sk.CosFace(margin=math.nan), ValueError, "got nan"),
        (lambda: sk.CosFace(margin=2.5), ValueError, "difference of cosines"),
        (lambda: sk.SphereFace(margin=0.0), ValueError, "m1 is a factor of the angle"),
        (lambda: sk.ArcFace(margin=[0.5]), TypeError, "m2 must be a float or a tensor, got list"),
        (lambda: sk.ArcFace(margin=torch.zeros(2, 2)), ValueError, r"shape \(N,\), got"),
        (lambda: sk.ArcFace(beyond_pi="clip"), ValueError, "beyond_pi must be .* got 'clip'"),
        (lambda: sk.ArcFace(interclass_filter=1.5), ValueError, r"in \[-1, 1\] or None, got 1.5"),
        (lambda: sk.CosFace(interclass_filter="0"), TypeError, "must be a float or None, got str"),
        (
            lambda: sk.SphereFace(interclass_filter_mode="skip"),
            ValueError,
            "must be 'drop' or 'zero', got 'skip'",
        ),
        (lambda: sk.ArcFace(target_grad="ste"), ValueError, "target_grad must be .* got 'ste'"),
    ],
)
def test_margins_that_make_no_sense(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("make", "good", "bad", "message"),
    [
        (
            sk.ArcFace,
            0.5,
            28.6,
            "m2 is an angle in radians and must be between -3.14159 and",
        ),
        (sk.CosFace, 0.35, -2.0, "m3 is a difference of cosines and must be between -2 and 2"),
        (sk.SphereFace, 1.35, 0.0, "m1 is a factor of the angle and must be between 0 and 16"),
        (sk.SphereFace, 1.35, 16.0, "m1 is a factor of the angle"),
    ],
)
def test_margins_per_row_are_checked_as_one_for_all_is(impl, make, good, bad, message):
    margin = torch.full((4,), good)
    expected = sk.margin_cross_entropy(X, W, T, make(margin=good), impl=impl, reduction="none")
    margin[2] = bad
    with pytest.raises(ValueError, match=rf"{message}.*, got {bad:.4g}.* at 2"):
        sk.margin_cross_entropy(X, W, T, make(margin=margin), impl=impl)
    with pytest.raises(ValueError, match=message):
        torch.compile(sk.margin_cross_entropy, fullgraph=True, backend="aot_eager")(
            X, W, T, make(margin=margin), impl=impl
        )
    # One that is not finite is its row's alone, and an ignored row has none.
    for margin[2] in (math.nan, -math.inf):
        found = sk.margin_cross_entropy(X, W, T, make(margin=margin), impl=impl, reduction="none")
        torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]])
    margin[2] = math.nan
    found = sk.margin_cross_entropy(X, W, T, make(margin=margin), impl=impl, reduction="none")
    assert found.isnan().tolist() == [False, False, True, False]
    margin[2], ignored = bad, T.clone()
    ignored[2] = -100
    found = sk.margin_cross_entropy(X, W, ignored, make(margin=margin), impl=impl, reduction="none")
    assert found[2] == 0


def test_structures_follow_the_schemas():
    """Torch's custom ops take and return their fields by position."""
    renamed = {"kept": "saved"}
    ops = torch.ops.synface_kernels

    def names(given):
        return tuple(renamed.get(each.name, each.name) for each in given)

    forward = ops.margin_cross_entropy_forward.default._schema
    backward = ops.margin_cross_entropy_backward.default._schema
    update = ops.margin_cross_entropy_update.default._schema
    inputs = BackwardInputs._fields
    assert names(forward.arguments)[:-4] == ForwardInputs._fields
    assert names(forward.returns) == ForwardOutputs._fields
    assert names(backward.arguments)[:-4] == inputs
    step = OptimizerStep._fields
    assert names(update.arguments) == (*inputs, "halves", *step, "impl", "gemm_dtype")
    # Exported programs of earlier versions have no GEMM dtype.
    assert all(op.arguments[-1].default_value is None for op in (forward, backward, update))
    # Nor do they give the margins' values to be checked.
    *_, index, m1, m2, m3 = ops.margin_cross_entropy_targets.default._schema.arguments
    assert index.name == "ignore_index"
    assert all(m.has_default_value() and m.default_value is None for m in (m1, m2, m3))


def test_a_bad_isa_is_named(monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"SYNFACE_CPU_ISA must be one of .*base.* got avx1024"):
        sk.margin_cross_entropy(X, W, T)


def test_explain():
    choice = sk.explain(sk.margin_cross_entropy, X, W, T)
    assert choice.impl == "cpu"
    assert "triton" in str(sk.explain("margin_cross_entropy", device="cuda"))
    with pytest.raises(
        ValueError, match=r"op must be one of .*margin_cross_entropy.* got 'softmax'"
    ):
        sk.explain("softmax")
    for function in (sk.nearest_neighbors, sk.row_sgd_, sk.row_adamw_, sk.domain_mixup):
        assert sk.explain(function).impl == sk.explain(function.__name__).impl == "cpu"
    with pytest.raises(TypeError, match="tensors must be tensors, got int"):
        sk.explain("margin_cross_entropy", 3)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'float32'"):
        sk.explain("margin_cross_entropy", dtype="float32")
