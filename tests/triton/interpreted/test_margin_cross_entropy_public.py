"""The margin softmax by Triton kernels, interpreted on CPU tensors, through the public function.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.ops._triton import mm
from synface_kernels.ops.margin_cross_entropy import config_triton, launch_triton, op
from tests.helpers.centers import assert_bits
from tests.helpers.margin_core import BF16, F16, F32, check_public, make_case, public

pytestmark = [pytest.mark.usefixtures("design"), pytest.mark.pairwise]
MARGINS: list[Callable[[], sk.CombinedMargin]] = [
    sk.ArcFace,
    sk.CosFace,
    sk.SphereFace,
    lambda: sk.CombinedMargin(32.0, m1=1.1, m2=0.3, m3=0.1),
]


@pytest.mark.parametrize("margin", MARGINS, ids=["arcface", "cosface", "sphereface", "combined"])
@pytest.mark.parametrize("mix", ["joint", "separate"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_public_function(k: int, mix: str, margin: Callable[[], sk.CombinedMargin]) -> None:
    case = make_case(7, 129, 33, k)
    weights = torch.rand(7, k, generator=torch.Generator().manual_seed(1))
    weights = torch.where(case.labels >= 0, weights, 0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-6)
    check_public(case, weights if k > 1 else None, margin=margin(), mix=mix)


def test_public_function_where_all_rows_are_ignored() -> None:
    input, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = sk.margin_cross_entropy(input, weight, torch.full((3,), -100), impl="triton")
    loss.backward()
    assert loss.item() == 0
    assert input.grad is not None
    assert weight.grad is not None
    assert not input.grad.any()
    assert not weight.grad.any()


def test_public_function_with_class_ids() -> None:
    case = make_case(7, 129, 33, 1)
    ids = torch.arange(0, 129, 2)
    case = case._replace(labels=torch.where(case.labels >= 0, case.labels // 2, -1))
    check_public(case, None, class_ids=ids, margin=sk.ArcFace())


def test_the_fused_design_multiplies_in_its_kernels_alone(
    design: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(7, 129, 33, 1)
    target = torch.where(case.labels >= 0, case.labels, -100)[:, 0]
    used: list[object] = []
    monkeypatch.setattr(launch_triton, "mm", lambda *given, **_: used.append(given) or mm(*given))
    actual = sk.margin_cross_entropy(case.input, case.weight, target, impl="triton")
    exact = sk.margin_cross_entropy(
        case.input.double(), case.weight.double(), target, impl="reference"
    )
    assert actual.item() == pytest.approx(exact.item(), rel=1e-6)
    assert bool(used) == (design == "tiled")


def test_an_unknown_design_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNFACE_MARGIN_DESIGN", "best")
    with pytest.raises(ValueError, match=r"SYNFACE_MARGIN_DESIGN must be one of .*got 'best'"):
        sk.margin_cross_entropy(
            torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]), impl="triton"
        )


# ---- a backward pass that steps the centers ------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "dtype", "options"),
    [
        ("plain", F32, {}),
        ("nesterov", F32, {"ids": True, "k": 2}),
        ("adamw", F32, {"m": 2}),
        ("nesterov", BF16, {"seed": 3, "input_dtype": BF16}),
        ("adamw", BF16, {"seed": 3, "ids": True}),
        ("nesterov", F32, {"n": 0}),
        ("adamw", F32, {"k": 3, "input_dtype": BF16}),
        ("nesterov", F32, {"k": 3, "input_dtype": F16, "ids": True, "m": 2}),
        ("plain", BF16, {"input_dtype": BF16, "k": 2, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_the_bits_of_backward_and_update(rule: str, dtype: torch.dtype, options: dict) -> None:
    # The second step has states, and rows that the first one left out.
    small = {"c": 21, "d": 8, "n": 5, "steps": 2}
    assert_bits(rule, dtype, **(small | options), impl="triton")


# ---- sub-centers, filter, smoothing, rows of NaN -------------------------------------------------


OPTIONS: list[tuple[int, dict]] = [
    (2, {}),
    (3, {"ids": True}),
    (3, {"margin": sk.ArcFace(interclass_filter=0.1)}),
    (1, {"margin": sk.ArcFace(interclass_filter=0.1)}),
    (1, {"margin": sk.CosFace(interclass_filter=0.0, interclass_filter_mode="zero")}),
    (1, {"margin": sk.ArcFace(100.0, interclass_filter=0.2)}),
    (1, {"label_smoothing": 0.1}),
    (1, {"label_smoothing": 0.3, "ids": True}),
]


def check_options(dtypes: tuple, k: int, mix: str, sub_centers: int, options: dict) -> Callable:
    """Check the public function against float64; return a function that runs it once more."""
    case = make_case(7, 150 * sub_centers, 16, k, dtypes=dtypes)
    options = {"mix": mix, **options}
    if options.pop("ids", False):
        options["class_ids"] = torch.arange(1, 150, 2)
    count = len(options.get("class_ids", range(150)))
    weights = torch.where(case.labels >= 0, 1.0, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    case = case._replace(
        weight=case.weight.reshape(150, sub_centers, 16) if sub_centers > 1 else case.weight,
        labels=torch.where(case.labels >= 0, case.labels % count, -1),
    )
    k_hot = weights if k > 1 else None
    # The GEMMs' dtype: the factor of the gradients is rounded to it.
    dtype = case.input.dtype if case.input.dtype == case.weight.dtype else F32

    def plain() -> tuple[Tensor, ...]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "statistics_dtype", lambda input: dtype)
            found = public(case, "reference", None, k_hot, **options)
        assert all(v.isfinite().all() for v in map(Tensor.to_dense, found[3:]))
        return found

    check_public(case, k_hot, plain, **options)
    return lambda: public(case, "triton", None, k_hot, **options)


@pytest.mark.parametrize(("k", "mix"), [(1, "joint"), (2, "joint"), (2, "separate"), (3, "joint")])
@pytest.mark.parametrize(("sub_centers", "options"), OPTIONS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_public_options(
    dtypes: tuple,
    sub_centers: int,
    options: dict,
    k: int,
    mix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_triton, "WORKSPACE_BYTES", 1)
    again = check_options(dtypes, k, mix, sub_centers, options)
    if (k, mix) == (2, "joint"):
        for a, b in zip(again(), again(), strict=True):
            assert torch.equal(*(v.to_dense() if v.is_sparse else v for v in (a, b)))


@pytest.mark.parametrize("design", ["fused"], indirect=True)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("sub_centers", "options"), [(1, {}), *OPTIONS[3:]])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16)], ids=str)
def test_two_accumulators(
    dtypes: tuple,
    sub_centers: int,
    options: dict,
    k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = {"H": 2, "BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_D": 16}
    monkeypatch.setattr(launch_triton, "block_config", lambda *_: blocks)
    check_options(dtypes, k, "joint", sub_centers, options)


def test_the_first_of_equal_sub_centers_gets_the_gradient() -> None:
    case = make_case(5, 20, 8, 1)
    weight = case.weight[:, None].repeat(1, 3, 1)
    grad = public(case._replace(weight=weight), "triton", F32, None)[-1]
    assert grad[:, 0].any()
    assert not grad[:, 1:].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_row_of_nan_that_nobody_asks_for(label_smoothing: float) -> None:
    case = make_case(6, 20, 8, 2)
    clean = case._replace(grad_lse=case.grad_lse.index_fill(0, torch.tensor(4), 0))
    input = case.input.clone()
    input[4, 2] = math.nan
    weights = torch.where(case.labels >= 0, 1.0, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    options = {"label_smoothing": label_smoothing}
    expected = public(clean, "triton", F32, weights, **options)
    actual = public(clean._replace(input=input), "triton", F32, weights, **options)
    assert actual[0][4].isnan()
    others = torch.arange(6) != 4
    for a, e in zip(actual[:4], expected[:4], strict=True):
        torch.testing.assert_close(a[others], e[others], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[4], expected[4], rtol=1e-5, atol=1e-6)
