"""The core's Triton kernels, interpreted on CPU tensors, against plain torch in float64.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.ops.margin_cross_entropy import kernel_triton, op
from tests.helpers.centers import assert_bits

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Core(NamedTuple):
    """Everything that forward and backward return."""

    negative_lse: Tensor
    negative_max: Tensor
    target_cosine: Tensor
    mean_center: Tensor
    grad_input: Tensor
    grad_weight: Tensor


class Case(NamedTuple):
    input: Tensor
    weight: Tensor
    labels: Tensor
    grad_lse: Tensor
    grad_cosine: Tensor
    scale: float


def make_case(
    n: int, c: int, d: int, k: int, scale: float = 64.0, dtypes: tuple = (F32, F32), seed: int = 0
) -> Case:
    """Random rows and labels; with enough rows, some are ignored, absent or zero."""
    rng = torch.Generator().manual_seed(seed)
    input = torch.randn(n, d, generator=rng)
    weight = torch.randn(c, d, generator=rng)
    labels = torch.stack([torch.randperm(c, generator=rng)[:k] for _ in range(n)])
    if n > 3:
        labels[1] = -1
        labels[2, 1:] = -1
        input[3] = 0
    if c > 3:
        weight[3] = 0
    grad_lse, grad_cosine = torch.randn(n, generator=rng), torch.randn(n, k, generator=rng)
    return Case(input.to(dtypes[0]), weight.to(dtypes[1]), labels, grad_lse, grad_cosine, scale)


def dense(case: Case, dtype: torch.dtype) -> Core:
    """The core by its definition, all N×C logits in plain torch of one dtype."""
    x, w = case.input.to(dtype), case.weight.to(dtype)
    present, scale = case.labels >= 0, case.scale

    def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        r = torch.where(norm <= 1e-12, 0, 1 / norm)
        return rows * r, r

    def tangent(u: Tensor, r: Tensor, v: Tensor) -> Tensor:
        return r * (v - (u * v).sum(1, keepdim=True) * u)

    (x, r_i), (w, r_j) = unit(x), unit(w)
    counted = (case.labels != -1).any(1)
    x, r_i = torch.where(counted[:, None], x, 0), torch.where(counted[:, None], r_i, 0)
    cosine = x @ w.T
    one_hot = torch.zeros(*case.labels.shape, w.shape[0] + 1, dtype=dtype)
    column = torch.where(present, case.labels, w.shape[0])
    one_hot = one_hot.scatter_(2, column[:, :, None], 1)[:, :, :-1]
    negative = (one_hot.sum(1) == 0) & counted[:, None]
    logits = torch.where(negative, scale * cosine, -math.inf)
    lse = logits.logsumexp(1)
    share = torch.where(negative & lse.isfinite()[:, None], (logits - lse[:, None]).exp(), 0)
    target = (one_hot * cosine[:, None, :]).sum(2)
    g = case.grad_lse.to(dtype)[:, None] * scale * share
    g = g + (one_hot * case.grad_cosine.to(dtype)[:, :, None]).sum(1)
    return Core(
        torch.where(counted, lse, 0),
        torch.where(counted, torch.where(negative, cosine, -math.inf).amax(1), 0),
        target,
        share @ w,
        tangent(x, r_i, g @ w),
        tangent(w, r_j, g.T @ x),
    )


def run(case: Case, class_ids: Tensor | None = None) -> Core:
    input, weight, labels, grad_lse, grad_cosine, scale = case
    lse, maximum, cosine, mean = forward(input, weight, labels, scale, True, class_ids)
    grads = backward(
        input, weight, labels, lse, mean, grad_lse, grad_cosine, scale, True, True, class_ids
    )
    return Core(lse, maximum, cosine, mean, *grads)


def forward(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    needs_input_grad: bool,
    class_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The launcher without filter and sums: lse, maximum, target cosines, mean center."""
    lse, maximum, cosine, filtered, cosine_sum, mean, center_sum = kernel_triton.forward(
        input, weight, class_ids, labels, scale, math.inf, needs_input_grad, False
    )
    assert filtered.numel() == cosine_sum.numel() == center_sum.numel() == 0
    return lse, maximum, cosine, mean


def backward(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    mean: Tensor,
    grad_lse: Tensor,
    grad_cosine: Tensor,
    scale: float,
    needs_input_grad: bool,
    needs_weight_grad: bool,
    class_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    none = torch.empty(0, dtype=torch.float64)
    return kernel_triton.backward(
        input, weight, class_ids, labels, lse, mean, none, grad_lse, grad_cosine, none, scale,
        math.inf, needs_input_grad, needs_weight_grad,
    )  # fmt: skip


def assert_close(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The largest error is at most twice that of plain torch, plus a few float32 roundings."""
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite]), name
    if not finite.any():
        return
    exact, actual, plain = exact[finite], actual[finite].double(), plain[finite].double()
    error, own = (actual - exact).abs().max(), (plain - exact).abs().max()
    few = 8 * torch.finfo(F32).eps * exact.abs().max().clamp_min(1)
    assert error <= 2 * own + few, f"{name}: error {error:.2e}, plain torch {own:.2e}"


def check(case: Case, actual: Core | None = None) -> Core:
    """Forward, with and without the input's gradient, and backward, against float64."""
    same = case.input.dtype == case.weight.dtype
    exact = dense(case, torch.float64)
    plain = dense(case, case.input.dtype if same else F32)
    plain = plain._replace(
        grad_input=plain.grad_input.to(case.input.dtype),
        grad_weight=plain.grad_weight.to(case.weight.dtype),
    )
    actual = run(case) if actual is None else actual
    for name in Core._fields:
        assert_close(name, getattr(actual, name), getattr(exact, name), getattr(plain, name))
    fused = forward(*case[:3], case.scale, False)
    assert fused[3].shape == (0,)
    for name, value in zip(Core._fields[:3], fused, strict=False):
        assert value.dtype == (F32 if name == "negative_max" else torch.float64)
        assert_close(f"fused {name}", value, getattr(exact, name), getattr(plain, name))
    assert actual.grad_input.dtype == case.input.dtype
    assert actual.grad_weight.dtype == case.weight.dtype
    return actual


# ---- against float64 -----------------------------------------------------------------------------

# One row, one class, one dimension; fewer classes than a block; odd sizes; more rows than a block.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 8, 2),
    (7, 5, 7, 3),
    (7, 700, 129, 2),
    (5, 129, 64, 3),
    (130, 64, 5, 1),
]


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_core(shape: tuple[int, int, int, int], dtypes: tuple) -> None:
    check(make_case(*shape, dtypes=dtypes))


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, BF16)], ids=str)
def test_mixed_dtypes_are_float32(dtypes: tuple) -> None:
    check(make_case(7, 65, 33, 2, dtypes=dtypes))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("scale", [64.0, 200.0])
def test_many_tiles(scale: float, dtypes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_triton, "WORKSPACE_BYTES", 1)  # the least: 128 classes
    check(make_case(6, 300, 16, 2, scale, dtypes))


@pytest.mark.parametrize("scale", [16.0, 64.0, 67.0, 68.0, 500.0])
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 1.0])
def test_all_negatives_at_one_cosine(
    cosine: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a shift by a constant would underflow or overflow."""
    monkeypatch.setattr(kernel_triton, "WORKSPACE_BYTES", 1)
    weight = torch.zeros(200, 2)
    weight[:, 0], weight[:, 1] = cosine, math.sqrt(1 - cosine**2)
    weight[7] = -weight[7]
    case = Case(
        torch.tensor([[2.0, 0.0]]),
        weight,
        torch.tensor([[7]]),
        torch.ones(1),
        torch.ones(1, 1),
        scale,
    )
    actual = check(case)
    assert actual.negative_lse.item() == pytest.approx(scale * cosine + math.log(199), abs=1e-4)


@pytest.mark.parametrize("scale", [64.0, 200.0])
def test_maximum_in_the_last_tile(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums so far, about e^-scale, must give way to one of e^scale."""
    monkeypatch.setattr(kernel_triton, "WORKSPACE_BYTES", 1)
    case = make_case(5, 300, 4, 1, scale)
    weight = -case.input[:1].repeat(300, 1) + 0.01 * torch.randn(300, 4)
    weight[299] = case.input[0]
    labels = torch.tensor([[0], [1], [-1], [2], [299]])
    check(case._replace(weight=weight, labels=labels))


@pytest.mark.parametrize("norm", [1e-10, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norms_of_any_size(norm: float, dtype: torch.dtype) -> None:
    case = make_case(5, 40, 8, 2, dtypes=(dtype, dtype))
    case = case._replace(weight=case.weight * norm)
    exact, actual = dense(case, torch.float64), run(case)
    plain = dense(case, dtype)
    for name in Core._fields:
        size = 1 / norm if name == "grad_weight" else 1
        values = (getattr(result, name) / size for result in (actual, exact, plain))
        assert_close(name, *values)


def test_cosines_of_one() -> None:
    """Rows that are centers or their opposites, as labels and as negatives."""
    case = make_case(6, 9, 8, 2)
    weight = case.weight.clone()
    weight[:6] = case.input * torch.tensor([1.0, -1.0, 2.0, -3.0, 1.0, 1.0])[:, None]
    labels = torch.tensor([[0, 1], [1, 0], [8, -1], [3, 2], [4, 8], [0, 1]])
    actual = check(case._replace(weight=weight, labels=labels))
    assert all(value.isfinite().all() for value in actual)


def test_targets_nearly_reached() -> None:
    """There the input's gradient is a small difference, which float32 would lose."""
    case = make_case(3, 4, 64, 1)
    weight = case.weight.clone()
    weight[:3] = case.input + 1e-4 * torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    case = case._replace(weight=weight, labels=torch.arange(3)[:, None], grad_lse=torch.zeros(3))
    actual, exact = run(case).grad_input, dense(case, torch.float64).grad_input
    assert (actual - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_rows_without_negatives() -> None:
    case = make_case(5, 3, 4, 3)
    actual = check(case)
    assert actual.negative_lse[0] == -math.inf
    assert actual.negative_max[0] == -math.inf
    assert not actual.mean_center[0].any()
    assert all(value.isfinite().all() for value in actual[2:])


def test_a_limit_that_leaves_no_negatives() -> None:
    case = make_case(5, 9, 4, 2)
    none = torch.empty(0, dtype=torch.float64)
    inputs = (case.input, case.weight, None, case.labels)
    lse, *_, mean, _ = kernel_triton.forward(*inputs, 64.0, -1.1, True, False)
    assert lse[0] == -math.inf
    rest = (case.grad_lse, torch.zeros(5, 2), none, 64.0, -1.1, True, True)
    for gradient in kernel_triton.backward(*inputs, lse, mean, none, *rest):
        assert not gradient.any()  # NaN counts as any


def test_gradients_of_target_cosines_alone_at_a_large_scale() -> None:
    case = make_case(3, 5, 8, 1, scale=1000.0)
    weight = case.input[0].expand(5, 8).contiguous()  # exp(1000 cos θ) is infinite
    check(case._replace(weight=weight, grad_lse=torch.zeros(3)))


def test_rows_without_labels_are_all_zero_whatever_they_hold() -> None:
    case = make_case(6, 20, 8, 2)
    clean = run(case)
    input = case.input.clone()
    input[1] = math.nan
    dirty = run(case._replace(input=input))
    for name, a, b in zip(Core._fields, clean, dirty, strict=True):
        assert torch.equal(a, b), name
    for value in dirty[:5]:
        assert not value[1].any()


def test_a_row_counts_though_its_labels_centers_are_elsewhere() -> None:
    case = make_case(6, 20, 8, 2)
    case.labels[0], case.labels[4, 1] = -2, -2
    actual = check(case)
    assert not actual.target_cosine[0].any()
    assert actual.grad_input[0].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_its_own_statistics_only(bad: float) -> None:
    case = make_case(6, 20, 8, 2)
    clean = run(case)
    input = case.input.clone()
    input[4, 2] = bad
    others = torch.arange(6) != 4
    for needs_input_grad in (False, True):
        dirty = forward(input, case.weight, case.labels, 64.0, needs_input_grad)
        for name, a, b in zip(Core._fields, clean, dirty, strict=False):
            if b.numel():
                torch.testing.assert_close(a[others], b[others], rtol=1e-5, atol=1e-5)
                assert b[4].isnan().all(), name


# ---- some rows of weight -------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_class_ids(dtypes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_triton, "WORKSPACE_BYTES", 1)
    case = make_case(6, 300, 16, 2, dtypes=dtypes)
    ids = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:300].sort().values
    weight = torch.full((700, 16), math.nan, dtype=dtypes[1])  # the others are not read
    weight[ids] = case.weight
    expected = run(case)
    check(case, run(case._replace(weight=weight), ids))
    for name, a, b in zip(
        Core._fields, run(case._replace(weight=weight), ids), expected, strict=True
    ):
        assert torch.equal(a, b), name
    fused = forward(case.input, weight, case.labels, case.scale, False, ids)
    assert fused[3].shape == (0,)
    for a, b in zip(fused[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


# ---- sub-centers, filter, smoothing, rows of NaN: through the public function --------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mix", ["joint", "separate"])
@pytest.mark.parametrize(
    ("sub_centers", "options"),
    [
        (2, {}),
        (3, {"ids": True}),
        (3, {"margin": sk.ArcFace(interclass_filter=0.1)}),
        (1, {"margin": sk.ArcFace(interclass_filter=0.1)}),
        (1, {"margin": sk.CosFace(interclass_filter=0.0, interclass_filter_mode="zero")}),
        (1, {"margin": sk.ArcFace(100.0, interclass_filter=0.2)}),  # the shift follows the maximum
        (1, {"label_smoothing": 0.1}),
        (1, {"label_smoothing": 0.3, "ids": True}),
    ],
)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_public_options(
    dtypes: tuple,
    sub_centers: int,
    options: dict,
    mix: str,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_triton, "WORKSPACE_BYTES", 1)
    k = 2 if weighted else 1
    case = make_case(7, 300 * sub_centers, 16, k, dtypes=dtypes)
    options = {"mix": mix, **options}
    if options.pop("ids", False):
        options["class_ids"] = torch.arange(1, 300, 2)
    count = len(options.get("class_ids", range(300)))
    weights = torch.where(case.labels >= 0, 1.0, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    case = case._replace(
        weight=case.weight.reshape(300, sub_centers, 16) if sub_centers > 1 else case.weight,
        labels=torch.where(case.labels >= 0, case.labels % count, -1),
    )
    k_hot = weights if weighted else None
    actual = public(case, "triton", None, k_hot, **options)
    exact = public(case, "reference", torch.float64, k_hot, **options)
    product = kernel_triton._product_dtypes(case.input, case.weight)[1]
    with monkeypatch.context() as patch:
        patch.setattr(op, "_statistics_dtype", lambda input: product)
        plain = public(case, "reference", None, k_hot, **options)
    for i, values in enumerate(zip(actual, exact, plain, strict=True)):
        assert_close(f"output {i}", *(v.to_dense() if v.is_sparse else v for v in values))
    again = public(case, "triton", None, k_hot, **options)
    for a, b in zip(actual, again, strict=True):
        assert torch.equal(*(v.to_dense() if v.is_sparse else v for v in (a, b)))


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


# ---- layouts, sizes and what is asked for --------------------------------------------------------


def test_no_rows() -> None:
    weight, labels = torch.randn(5, 3), torch.empty(0, 2, dtype=torch.int64)
    input = torch.empty(0, 3)
    lse, maximum, cosine, mean = forward(input, weight, labels, 64.0, True)
    assert [t.shape for t in (lse, maximum, cosine, mean)] == [(0,), (0,), (0, 2), (0, 3)]
    assert forward(input, weight, labels, 64.0, False)[3].shape == (0,)
    grad_input, grad_weight = backward(
        input, weight, labels, lse, mean, lse, cosine, 64.0, True, True
    )
    assert grad_input.shape == (0, 3)
    assert torch.equal(grad_weight, torch.zeros(5, 3))


def test_only_what_is_asked_for() -> None:
    input, weight, labels, grad_lse, grad_cosine, scale = case = make_case(5, 20, 8, 2)
    full = run(case)
    empty = torch.empty(0)
    for asked in ((True, False), (False, True), (False, False)):
        mean = full.mean_center if asked[0] else empty
        grads = backward(
            input,
            weight,
            labels,
            full.negative_lse,
            mean,
            grad_lse,
            grad_cosine,
            scale,
            *asked,
        )
        for wanted, grad, expected in zip(asked, grads, full[4:], strict=True):
            assert torch.equal(grad, expected) if wanted else grad.shape == (0,)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_layout(dtype: torch.dtype) -> None:
    case = make_case(6, 30, 8, 2, dtypes=(dtype, dtype))
    expected = run(case)

    def strided(t: Tensor) -> Tensor:
        return (
            t.repeat_interleave(3, 0)[::3]
            if t.dim() == 1
            else torch.cat([t, t], 1)[:, : t.shape[1]]
        )

    def transposed(t: Tensor) -> Tensor:
        return t.T.contiguous().T if t.dim() == 2 else strided(t)

    for layout in (strided, transposed):
        actual = run(Case(*(layout(t) for t in case[:5]), case.scale))
        for name, a, b in zip(Core._fields, actual, expected, strict=True):
            assert torch.equal(a, b), name


def test_expanded_gradients() -> None:
    case = make_case(6, 30, 8, 2)
    check(case._replace(grad_lse=torch.ones(()).expand(6), grad_cosine=torch.ones(()).expand(6, 2)))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_answer_twice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_triton, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(kernel_triton, "_properties", lambda device: (80, 3))
    case = make_case(20, 400, 16, 3, dtypes=(dtype, dtype))
    for first, second in zip(check(case), run(case), strict=True):
        assert torch.equal(first, second)
    fused = [forward(*case[:3], case.scale, False) for _ in range(2)]
    for first, second in zip(*fused, strict=True):
        assert torch.equal(first, second)


def test_offsets_pass_32_bits() -> None:
    """The last of five rows of weight starts 2^32 elements after the first."""
    case = make_case(3, 5, 4, 1, dtypes=(F16, F16))
    storage = torch.empty(4 * 2**30 + 4, dtype=F16)  # untouched pages take no memory
    weight = storage.as_strided((5, 4), (2**30, 1))
    weight.copy_(case.weight)
    check(case._replace(weight=weight), run(case._replace(weight=weight)))
    for a, b in zip(run(case._replace(weight=weight)), run(case), strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing() -> None:
    case = make_case(6, 30, 8, 2)
    expected = run(case)
    with torch.autocast("cpu", dtype=BF16):
        actual = run(case)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["input", "weight"])
def test_float64_is_an_error(name: str) -> None:
    case = make_case(2, 3, 4, 1)
    case = case._replace(**{name: getattr(case, name).double()})
    with pytest.raises(ValueError, match=rf"{name} must be float32.*got torch.float64.*impl='cpu'"):
        forward(*case[:3], 64.0, True)


def test_the_workspace_is_bounded() -> None:
    """Tiles fit 64 MiB wherever 128 classes do, and cover all classes in equal parts."""
    for n, d, c in ((1, 1, 10**8), (512, 512, 10**6), (512, 512, 5), (8192, 512, 10**6)):
        for dtypes in ((F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)):
            x = torch.empty(n, d, dtype=dtypes[0], device="meta")
            per_class = kernel_triton._bytes_per_center(
                x, torch.empty(1, d, dtype=dtypes[1], device="meta"), None
            )
            tile = kernel_triton._tile_classes(c, per_class)
            assert tile % 128 == 0
            assert tile * per_class <= kernel_triton.WORKSPACE_BYTES
            assert (-(-c // tile)) * tile < c + tile


# ---- through the public function -----------------------------------------------------------------

MARGINS: list[Callable[[], sk.CombinedMargin]] = [
    sk.ArcFace,
    sk.CosFace,
    sk.SphereFace,
    lambda: sk.CombinedMargin(32.0, m1=1.1, m2=0.3, m3=0.1),
]


def public(
    case: Case, impl: str, dtype: torch.dtype | None, weights: Tensor | None, **options: object
) -> tuple[Tensor, ...]:
    """Losses of all rows, statistics and the gradients of the losses' weighted sum; in a dtype, or
    in the case's own.
    """
    input = case.input.detach().to(dtype, copy=True).requires_grad_()
    weight = case.weight.detach().to(dtype, copy=True).requires_grad_()
    target = torch.where(case.labels >= 0, case.labels, -100)
    target = target if weights is not None else target[:, 0]
    losses, stats = sk.margin_cross_entropy(
        input, weight, target, target_weight=weights, reduction="none", return_stats=True,
        impl=impl, **options,
    )  # fmt: skip
    (losses * case.grad_lse.to(losses.dtype)).sum().backward()
    assert input.grad is not None
    assert weight.grad is not None
    return (
        losses.detach(),
        stats.lse.detach(),
        stats.target_cosine.detach(),
        input.grad,
        weight.grad,
    )


@pytest.mark.parametrize("margin", MARGINS, ids=["arcface", "cosface", "sphereface", "combined"])
@pytest.mark.parametrize("mix", ["joint", "separate"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_public_function(k: int, mix: str, margin: Callable[[], sk.CombinedMargin]) -> None:
    case = make_case(7, 129, 33, k)
    weights = torch.rand(7, k, generator=torch.Generator().manual_seed(1))
    weights = torch.where(case.labels >= 0, weights, 0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-6)
    options = {"margin": margin(), "mix": mix}
    k_hot = weights if k > 1 else None
    actual = public(case, "triton", F32, k_hot, **options)
    exact = public(case, "reference", torch.float64, k_hot, **options)
    plain = public(case, "reference", F32, k_hot, **options)
    for i, values in enumerate(zip(actual, exact, plain, strict=True)):
        assert_close(f"output {i}", *values)


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
    options = {"class_ids": ids, "margin": sk.ArcFace()}
    case = case._replace(labels=torch.where(case.labels >= 0, case.labels // 2, -1))
    actual = public(case, "triton", F32, None, **options)
    exact = public(case, "reference", torch.float64, None, **options)
    plain = public(case, "reference", F32, None, **options)
    for i, values in enumerate(zip(actual, exact, plain, strict=True)):
        dense_values = (v.to_dense() if v.is_sparse else v for v in values)
        assert_close(f"output {i}", *dense_values)


def test_public_function_without_gradients_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(7, 129, 33, 1)
    target = torch.where(case.labels >= 0, case.labels, -100)[:, 0]

    def forbidden(*args: object) -> None:
        raise AssertionError("no gradient was asked for")

    monkeypatch.setattr(kernel_triton, "_forward_tiled", forbidden)
    actual = sk.margin_cross_entropy(case.input, case.weight, target, impl="triton")
    exact = sk.margin_cross_entropy(
        case.input.double(), case.weight.double(), target, impl="reference"
    )
    assert actual.item() == pytest.approx(exact.item(), rel=1e-6)


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
    ],
    ids=str,
)
def test_the_bits_of_backward_and_update(rule: str, dtype: torch.dtype, options: dict) -> None:
    assert_bits(rule, dtype, **({"c": 21, "d": 8, "n": 5} | options), impl="triton")
