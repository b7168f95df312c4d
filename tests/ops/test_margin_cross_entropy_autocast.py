"""The margin softmax under autocast: GEMMs of operands rounded to its dtype, against float64.

An operand that has autocast's dtype is multiplied as it is; another one is normalized in float32
and rounded. Targets' cosines and sums of cosines come from what was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import synface_kernels as sk
from synface_kernels import _load
from synface_kernels._select import interpreting
from synface_kernels.ops.margin_cross_entropy import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ISAS = _load.cpu_isas()
# Implementations, each with an instruction set of the CPU.
IMPLS = [("reference", ISAS[-1]), *(("cpu", isa) for isa in ISAS)]
FASTEST = [("reference", ISAS[-1]), *(("cpu", isa) for isa in ISAS[-3:])]
if interpreting():  # tests/triton/interpreted runs some of these tests
    IMPLS = FASTEST = [("triton", ISAS[-1])]
SHAPES = [(1, 2, 1), (5, 33, 3), (64, 1500, 129), (530, 700, 64)]
ROWS, CLASSES, MORE_CLASSES = 40, 400, 900  # of several blocks of classes
if interpreting():  # whose blocks have 128 classes and 64 dimensions, and which is slow
    SHAPES = [(1, 2, 1), (5, 33, 3), (20, 1500, 129)]
    ROWS, CLASSES, MORE_CLASSES = 7, 132, 260
PAIRS = [(F32, F32), (BF16, F32), (F32, BF16)]
MARGIN = sk.ArcFace(64.0, 0.5)
UNIT = {
    BF16: 2.0**-8,
    F16: 2.0**-11,
    F32: 2.0**-24,
}  # the most that rounding to it changes a number
EPS = torch.finfo(F32).eps


class Case(NamedTuple):
    """Arguments of a step: with K labels, they are (N, K) with weights, even for K = 1."""

    x: Tensor
    w: Tensor
    target: Tensor
    weights: Tensor
    upstream: Tensor

    def to(self, dtypes: tuple[torch.dtype, torch.dtype]) -> Case:
        return self._replace(x=self.x.to(dtypes[0]), w=self.w.to(dtypes[1]))


def problem(n: int, c: int, d: int, k: int = 1, sub_centers: int = 1, seed: int = 0) -> Case:
    """Centers, embeddings that lean towards their labels', and the loss's gradient."""
    g = torch.Generator().manual_seed(seed + n + 7 * c + 31 * d)
    several = (sub_centers,) if sub_centers > 1 else ()
    w = torch.randn(c, *several, d, generator=g) * 10 ** torch.rand(c, *([1] * len(several)), 1)
    target = torch.stack([torch.randperm(c, generator=g)[:k] for _ in range(n)])
    near = F.normalize((w[:, 0] if several else w)[target[:, 0]])
    x = F.normalize(torch.randn(n, d, generator=g)) + 0.7 * near
    weights = F.normalize(torch.rand(n, k, generator=g) + 0.1, p=1)
    return Case(
        x * 10 ** torch.rand(n, 1, generator=g), w, target, weights, torch.rand(n, generator=g)
    )


def run(
    case: Case,
    impl: str,
    isa: str = ISAS[-1],
    autocast: torch.dtype | None = BF16,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the losses, target cosines and both gradients; the backward pass is outside."""
    x, w = (v.detach().clone().requires_grad_() for v in (case.x, case.w))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYNFACE_CPU_ISA", isa)
        with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
            loss, stats = sk.margin_cross_entropy(
                x,
                w,
                case.target,
                options.pop("margin", MARGIN),
                target_weight=case.weights,
                reduction="none",
                return_stats=True,
                impl=impl,
                **options,
            )
        dx, dw = torch.autograd.grad(loss, (x, w), case.upstream.to(loss.dtype))
    return loss.detach(), stats.target_cosine.detach(), dx, dw.to_dense()


def exact(
    case: Case, autocast: torch.dtype = BF16, class_ids: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the definition in float64, on the same rounded operands."""
    x, w = (v.detach().double().requires_grad_() for v in (case.x, case.w))
    rounded = tuple(None if v.dtype == autocast else autocast for v in (case.x, case.w))
    margin = options.pop("margin", MARGIN)
    loss, _, cosine, _ = reference.margin_cross_entropy(
        x,
        w if class_ids is None else w[class_ids],
        case.target,
        case.weights.double(),
        margin,
        options.pop("mix", "joint"),
        options.pop("label_smoothing", 0.0),
        rounded,
    )
    assert not options
    return (
        loss.detach(),
        cosine.detach(),
        *torch.autograd.grad(loss, (x, w), case.upstream.double()),
    )


def assert_close(
    case: Case,
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    autocast: torch.dtype = BF16,
) -> None:
    """Assert errors of float32 sums, and of gradient factors rounded to autocast's dtype."""
    loss, cosine, *grads = actual
    assert loss.dtype == cosine.dtype == F32
    # Where float32 normalizes, one element may be rounded to its other neighbor, and in a row of
    # cosines all the more.
    unit_x, unit_w = F.normalize(case.x.float()), F.normalize(case.w.float(), dim=-1)
    flip = UNIT[autocast] * unit_x.abs().max() * unit_w.abs().max()
    error = (loss - expected[0]).abs()
    assert error.max() <= 2 * MARGIN.scale * (flip + 8 * EPS)
    assert error.mean() <= 2e-5 * expected[0].mean() + 2 * MARGIN.scale * EPS
    assert (cosine - expected[1]).abs().max() <= 4 * EPS
    # At most this is the sum of a row's factors, its labels' aside, without the embedding's length.
    mass = MARGIN.scale * case.upstream * (1 - (-expected[0]).exp())
    most = (
        (mass / case.x.double().norm(dim=1)).norm(),
        mass.sum() / case.w.double().norm(dim=-1).min(),
    )
    for grad, rows, right, factors in zip(grads, (case.x, case.w), expected[2:], most, strict=True):
        assert grad.dtype == rows.dtype
        assert grad.shape == rows.shape
        # In few dimensions a gradient may be much less than its terms, most of which are along x.
        size = right.norm() if rows.shape[-1] >= 16 else right.norm() + factors
        tiny = MARGIN.scale * math.exp(-87) + 64 * MARGIN.scale * EPS / rows.norm(dim=-1).min()
        rounding = UNIT[autocast] + UNIT[rows.dtype]
        off = (grad.double() - right).norm()
        assert off <= rounding * size + tiny * math.sqrt(right.numel()), off / right.norm()


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize(("impl", "isa"), IMPLS)
@pytest.mark.parametrize(("n", "c", "d"), SHAPES)
def test_matches_float64(impl, isa, n, c, d, dtypes):
    case = problem(n, c, d).to(dtypes)
    assert_close(case, run(case, impl, isa), exact(case))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32), (F32, F16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(("impl", "isa"), IMPLS)
def test_float16(impl, isa, dtypes):
    """Tensors of bfloat16 are rounded to it too."""
    case = problem(ROWS, MORE_CLASSES, 65).to(dtypes)
    assert_close(case, run(case, impl, isa, F16), exact(case, F16), F16)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "separate": {"mix": "separate"},
    "class_ids": {"class_ids": torch.arange(1, 2 * CLASSES, 2)},
    "sub-centers": {},
    "drop": {"margin": sk.CombinedMargin(64.0, 1.0, 0.5, interclass_filter=0.1)},
    "zero": {
        "margin": sk.CombinedMargin(
            64.0, 1.0, 0.5, interclass_filter=0.1, interclass_filter_mode="zero"
        )
    },
    "smoothing": {"label_smoothing": 0.1},
    "workspace": {"workspace": ROWS * 4 * CLASSES * 3 // 4},
}


def of_option(name: str, k: int, dtypes: tuple[torch.dtype, torch.dtype]) -> Case:
    case = problem(ROWS, CLASSES, 65, k, sub_centers=3 if name == "sub-centers" else 1)
    if name == "class_ids":  # the same centers, among others
        w = torch.randn(2 * CLASSES, 65)
        w[1::2] = case.w
        case = case._replace(w=w)
    return case.to(dtypes)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("impl", "isa"), FASTEST)
def test_every_option_matches_float64(impl, isa, name, k, dtypes):
    case, options = of_option(name, k, dtypes), dict(OPTIONS[name])
    actual = run(case, impl, isa, **options)
    options.pop("workspace", None)
    assert_close(case, actual, exact(case, **options))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("name", ["plain", "class_ids", "sub-centers", "smoothing"])
@pytest.mark.parametrize(("impl", "isa"), FASTEST)
def test_an_update_has_the_bits_of_gradient_and_step(impl, isa, name, dtypes):
    case, options = of_option(name, 2, dtypes), OPTIONS[name]
    _, _, dx, dw = run(case, impl, isa, **options)
    ids = options.get("class_ids", torch.arange(len(case.w)))
    stepped, momentum = case.w.clone().flatten(1), torch.zeros_like(case.w).flatten(1)
    sk.row_sgd_(
        stepped, dw.flatten(1)[ids], ids, lr=0.1, momentum=0.9, momentum_buffer=momentum, impl=impl
    )
    x, w = case.x.clone().requires_grad_(), case.w.clone()
    update = sk.SGDUpdate(lr=0.1, momentum=0.9, momentum_buffer=torch.zeros_like(w))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SYNFACE_CPU_ISA", isa)
        with torch.autocast("cpu", BF16):
            loss = sk.margin_cross_entropy(
                x,
                w,
                case.target,
                MARGIN,
                target_weight=case.weights,
                reduction="none",
                update=update,
                impl=impl,
                **options,
            )
        loss.backward(case.upstream)
    assert torch.equal(x.grad, dx)
    assert torch.equal(w.flatten(1), stepped)


@given(
    n=st.integers(1, 40),
    c=st.integers(2, 1200),
    d=st.integers(2, 90),
    k=st.integers(1, 3),
    seed=st.integers(0, 1000),
    dtypes=st.sampled_from(PAIRS),
)
@pytest.mark.slow
def test_any_shape(n, c, d, k, seed, dtypes):
    case = problem(n, max(c, k), d, k, seed=seed).to(dtypes)
    expected = exact(case)
    for isa in ISAS[-3:]:
        assert_close(case, run(case, "cpu", isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [1100, 1537])
def test_slices_of_the_depth(isa, d):
    case = problem(9, 40, d)
    assert_close(case, run(case, "cpu", isa), exact(case))


def test_the_definition_is_what_torch_makes_of_a_linear_layer():
    """F.linear(F.normalize(x), F.normalize(w)), but for the targets' cosines and the sums."""
    case = problem(20, 300, 64)
    x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
    with torch.autocast("cpu", BF16):
        rounded = F.linear(F.normalize(x), F.normalize(w)).float()
    with torch.no_grad():  # undo the rounding of the sums
        unit = (F.normalize(v).bfloat16().float() for v in (x, w))
        product = next(unit) @ next(unit).T
        torch.testing.assert_close(rounded, product, rtol=UNIT[BF16], atol=1e-6)
    product = rounded + (product - rounded).detach()
    cosine = F.normalize(x) @ F.normalize(w).T
    hit = F.one_hot(case.target[:, 0], 300).bool()
    logits = torch.where(hit, (cosine.acos() + MARGIN.m2).cos(), product)
    loss = F.cross_entropy(MARGIN.scale * logits, case.target[:, 0], reduction="none")
    dx, dw = torch.autograd.grad(loss, (x, w), case.upstream)
    expected = exact(case)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    for grad, right in ((dx, expected[2]), (dw, expected[3])):
        assert (grad - right).norm() <= 2 * UNIT[BF16] * right.norm()


# ---- what changes, and what does not -------------------------------------------------------------


def bits(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize(("impl", "isa"), IMPLS)
def test_what_autocast_changes(impl, isa):
    """Not float64, not tensors of its dtype, not targets' cosines, and nothing when disabled."""
    case = problem(ROWS, MORE_CLASSES, 64)
    plain, changed = run(case, impl, isa, None), run(case, impl, isa)
    assert bits(plain, changed) == [False, True, False, False]
    assert (changed[0] - plain[0]).norm() > 1e-4 * plain[0].norm()  # by more than float32 does
    with torch.autocast("cpu", BF16):
        assert all(bits(run(case, impl, isa, None), plain))
    for dtype in (BF16,) if impl == "triton" else (torch.float64, BF16):
        same = case.to((dtype, dtype))
        assert all(bits(run(same, impl, isa, None), run(same, impl, isa)))


@pytest.mark.parametrize(("impl", "isa"), IMPLS)
def test_the_backward_pass_goes_by_the_forward_pass(impl, isa, monkeypatch):
    """It is inside of autocast, outside, or in one of another dtype."""
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    case = problem(ROWS, MORE_CLASSES, 64)
    for forward in (BF16, F16):
        expected = run(case, impl, isa, forward)[2:]
        for backward in (BF16, F16):
            x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
            with torch.autocast("cpu", forward):
                loss = sk.margin_cross_entropy(
                    x, w, case.target[:, 0], MARGIN, reduction="none", impl=impl
                )
            with torch.autocast("cpu", backward):
                grads = torch.autograd.grad(loss, (x, w), case.upstream)
            for grad, right in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("isa", ISAS)
def test_no_bit_depends_on_the_workspace_or_on_class_ids(isa):
    case = problem(520, 700, 48)
    w = case.w.repeat_interleave(2, 0)
    w[::2] = 0.5
    ids = torch.arange(1, 1400, 2)
    expected = run(case, "cpu", isa)
    for workspace in (0, 10**6, 10**9):
        actual = run(case._replace(w=w), "cpu", isa, class_ids=ids, workspace=workspace)
        assert all(bits((*actual[:3], actual[3][ids]), expected))


def test_the_default_is_one_of_the_instruction_sets():
    """The last one, or float32 GEMMs where those of bfloat16 are slower."""
    case = problem(40, 900, 64)
    default = run(case, "cpu", "")
    same = [all(bits(run(case, "cpu", isa), default)) for isa in ISAS]
    assert same[-1] or (ISAS[-1].endswith("bf16") and same[ISAS.index("avx512")])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_twice(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = problem(70, 3000, 96)
        for isa in ISAS[-3:]:
            assert all(bits(run(case, "cpu", isa), run(case, "cpu", isa)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_high_precision_does_not_split_what_autocast_rounds(isa):
    before = torch.get_float32_matmul_precision()
    case = problem(40, 900, 64)
    expected = run(case, "cpu", isa)
    torch.set_float32_matmul_precision("high")
    try:
        assert all(bits(run(case, "cpu", isa), expected))
    finally:
        torch.set_float32_matmul_precision(before)


# ---- special rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize(("impl", "isa"), IMPLS)
def test_gradients_are_orthogonal_to_their_rows_and_zero_rows_have_none(impl, isa, dtypes):
    case = problem(20, 300, 40)
    case.x[3], case.w[7] = 0, 0
    case.target[3], case.target[:, 0][case.target[:, 0] == 7] = 8, 8
    case = case.to(dtypes)
    actual = run(case, impl, isa)
    assert all(value.isfinite().all() for value in actual)
    for grad, rows in zip(actual[2:], (case.x, case.w), strict=True):
        along = (grad.double() * rows.double()).sum(1).abs()
        size = grad.double().norm(dim=1) * rows.double().norm(dim=1)
        assert (along <= (2 * UNIT[rows.dtype] + 1e-6) * size + 1e-6).all()
    assert not actual[2][3].any()
    assert not actual[3][7].any()


@pytest.mark.parametrize(("impl", "isa"), IMPLS)
def test_rows_of_any_length(impl, isa):
    """Beyond the squares of float32, and beyond what rounds to a finite float16."""
    case = problem(min(ROWS, 20), min(CLASSES, 300), 40)
    case = case._replace(x=F.normalize(case.x), w=F.normalize(case.w))
    for autocast in (BF16, F16):
        expected = run(case, impl, isa, autocast)
        for factor in (2.0**60, 2.0**-60 if impl == "cpu" else 2.0**-20, 2.0**120):
            if factor < 1e-12:
                continue  # zero rows
            longer = case._replace(x=case.x * factor, w=case.w * factor)
            actual = run(longer, impl, isa, autocast)
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
            for grad, right in zip(actual[2:], expected[2:], strict=True):
                off = (grad.double() * factor - right).norm()
                assert off <= UNIT[BF16] * right.double().norm()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_are_not_finite(isa):
    case = problem(20, 300, 40)
    expected = run(case, "cpu", isa)
    for value in (math.nan, math.inf):
        broken = case._replace(x=case.x.clone(), upstream=case.upstream.clone())
        broken.x[5, 2], broken.upstream[5] = value, 0
        loss, _, dx, dw = run(broken, "cpu", isa)
        assert not loss[5].isfinite()
        others = torch.arange(20) != 5
        assert torch.equal(loss[others], expected[0][others])
        assert torch.equal(dx[others], expected[2][others])
        assert dw.isfinite().all()


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.slow
def test_compiled(impl):
    """Autocast may be within or around the compiled function; its state guards the graph."""
    case = problem(9, 50, 16)
    target = case.target[:, 0]

    def outside(x: Tensor, w: Tensor) -> Tensor:
        return sk.margin_cross_entropy(x, w, target, MARGIN, reduction="none", impl=impl)

    def inside(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return outside(x, w)

    def gradients(step: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
        loss = step(x, w)
        return loss, *torch.autograd.grad(loss, (x, w), case.upstream)

    compiled = torch.compile(outside, fullgraph=True, backend="aot_eager")
    plain, expected = gradients(outside), gradients(inside)
    assert not torch.equal(plain[0], expected[0])
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            around = gradients(compiled)
        for a, b in zip((*around, *gradients(compiled)), (*expected, *plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    within = gradients(torch.compile(inside, fullgraph=True, backend="aot_eager"))
    for a, b in zip(within, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("autocast", [BF16, F16])
def test_opcheck(autocast, dtypes):
    case = problem(6, 20, 8, 2).to(dtypes)
    ops = torch.ops.synface_kernels
    sample = (
        case.x.requires_grad_(), case.w.requires_grad_(), None, case.target, 64.0, math.inf, True,
        True, 0, False, "cpu", autocast,
    )  # fmt: skip
    torch.library.opcheck(ops.margin_cross_entropy_forward.default, sample)
    outputs = ops.margin_cross_entropy_forward(*sample)
    lse, _, cosine, _, total, *saved = (v.detach() for v in outputs)
    gradients = torch.ones_like(lse), torch.ones_like(cosine), torch.ones_like(total)
    sample = (
        case.x.detach(), case.w.detach(), None, case.target, lse, *saved, *gradients, 64.0,
        math.inf, True, True, False, "cpu", autocast,
    )  # fmt: skip
    torch.library.opcheck(ops.margin_cross_entropy_backward.default, sample)


def test_functional_gradients(monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", ISAS[-1])
    case = problem(6, 20, 8)
    _, _, dx, _ = run(case, "cpu")

    def losses(x: Tensor) -> Tensor:
        loss = sk.margin_cross_entropy(x, case.w, case.target[:, 0], MARGIN, reduction="none")
        return (loss * case.upstream).sum()

    with torch.autocast("cpu", BF16):
        assert torch.equal(torch.func.grad(losses)(case.x), dx)


# ---- wrong arguments -----------------------------------------------------------------------------


def test_a_dtype_that_no_kernel_has_is_named():
    case = problem(6, 20, 8)
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", F32)  # torch.autocast itself would refuse it
    torch.set_autocast_enabled("cpu", True)
    try:
        with pytest.raises(
            ValueError, match=r"autocast's dtype on cpu must be bfloat16 or float16, got .*float32"
        ):
            sk.margin_cross_entropy(case.x, case.w, case.target[:, 0])
        x, w = case.x.double(), case.w.double()
        assert sk.margin_cross_entropy(x, w, case.target[:, 0]).dtype == torch.float64
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", before)


def test_tensors_on_two_devices_are_named_as_without_autocast():
    case = problem(6, 20, 8)
    with torch.autocast("cpu", BF16), pytest.raises(ValueError, match=r"weight .* device cpu, got"):
        sk.margin_cross_entropy(case.x, case.w.to("meta"), case.target[:, 0])


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.int64])
def test_the_op_itself_names_a_wrong_dtype(dtype):
    case = problem(6, 20, 8)
    forward = torch.ops.synface_kernels.margin_cross_entropy_forward
    arguments = None, case.target, 64.0, math.inf, True, False, 0, False, "cpu"
    with pytest.raises(ValueError, match="gemm_dtype must be bfloat16 or float16"):
        forward(case.x, case.w, *arguments, dtype)
    with pytest.raises(ValueError, match="None for float64 tensors"):
        forward(case.x.double(), case.w.double(), *arguments, BF16)
