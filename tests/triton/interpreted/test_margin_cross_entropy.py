"""The core's Triton kernels, interpreted on CPU tensors, against plain torch in float64.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from synface_kernels.ops.margin_cross_entropy import (
    config_triton,
    launch_triton,
    operands_triton,
)
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs, ForwardInputs
from tests.helpers.margin_core import (
    BF16,
    F16,
    F32,
    Case,
    Core,
    Forward,
    assert_close,
    backward,
    check,
    dense,
    forward,
    make_case,
    run,
)

pytestmark = [pytest.mark.usefixtures("design"), pytest.mark.pairwise]

# ---- against float64 -----------------------------------------------------------------------------

# One row, one class, one dimension; fewer classes than a block; odd sizes; more rows than a block.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 8, 2),
    (7, 5, 7, 3),
    (7, 300, 129, 2),
    (5, 129, 64, 3),
    (130, 140, 5, 1),
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
    monkeypatch.setattr(config_triton, "WORKSPACE_BYTES", 1)  # the least: 128 classes
    check(make_case(6, 300, 16, 2, scale, dtypes))


@pytest.mark.parametrize("scale", [16.0, 64.0, 67.0, 68.0, 500.0])
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 1.0])
def test_all_negatives_at_one_cosine(
    cosine: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shift by a constant would underflow or overflow here."""
    monkeypatch.setattr(config_triton, "WORKSPACE_BYTES", 1)
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
    monkeypatch.setattr(config_triton, "WORKSPACE_BYTES", 1)
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
    """Near its target an embedding's gradient is a small difference, which float32 would lose."""
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
    for name in ("target_cosine", "grad_input", "grad_weight"):
        assert getattr(actual, name).isfinite().all(), name


def test_a_limit_that_leaves_no_negatives() -> None:
    case = make_case(5, 9, 4, 2)._replace(grad_cosine=torch.zeros(5, 2))
    found = launch_triton.forward(
        ForwardInputs(case.input, case.weight, None, case.labels, 64.0, -1.1, True, False)
    )
    assert found.negative_lse[0] == -math.inf
    outputs = Forward(*(getattr(found, name) for name in Forward._fields))
    for gradient in backward(case, outputs, limit=-1.1):
        assert not gradient.any()  # NaN counts as any


def test_gradients_of_target_cosines_alone_at_a_large_scale() -> None:
    case = make_case(3, 5, 8, 1, scale=1000.0)
    weight = case.input[0].expand(5, 8).contiguous()  # exp(1000 cos θ) is infinite
    check(case._replace(weight=weight, grad_lse=torch.zeros(3)))


def test_rows_without_labels_are_all_zero_whatever_they_hold() -> None:
    case = make_case(6, 20, 8, 2)
    clean = run(case)
    input = case.input.clone()
    grad_lse, grad_cosine = case.grad_lse.clone(), case.grad_cosine.clone()
    input[1] = grad_lse[1] = grad_cosine[1] = math.nan
    dirty = run(case._replace(input=input, grad_lse=grad_lse, grad_cosine=grad_cosine))
    for name, a, b in zip(Core._fields, clean, dirty, strict=True):
        assert torch.equal(a, b), name
    for name in set(Core._fields) - {"grad_weight"}:
        assert not getattr(dirty, name)[1].any(), name


def test_a_row_is_valid_though_its_labels_centers_are_elsewhere() -> None:
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
    dirty = forward(case._replace(input=input))
    for name, a, b in zip(Core._fields[:3], clean, dirty, strict=False):
        torch.testing.assert_close(a[others], b[others], rtol=1e-5, atol=1e-5)
        assert b[4].isnan().all(), name


# ---- some rows of weight -------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_class_ids(dtypes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_triton, "WORKSPACE_BYTES", 1)
    case = make_case(6, 300, 16, 2, dtypes=dtypes)
    ids = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:300].sort().values
    weight = torch.full((700, 16), math.nan, dtype=dtypes[1])  # the others are not read
    weight[ids] = case.weight
    actual = check(case, run(case._replace(weight=weight), ids))
    for name, a, b in zip(Core._fields, actual, run(case), strict=True):
        assert torch.equal(a, b), name


# ---- layouts, sizes and what is asked for --------------------------------------------------------


def test_no_rows() -> None:
    none = torch.empty(0, 2)
    case = Case(torch.empty(0, 3), torch.randn(5, 3), none.long(), none[:, 0], none, 64.0)
    outputs = forward(case)
    assert [t.shape for t in outputs] == [(0,), (0,), (0, 2), (5,)]
    grad_input, grad_weight = backward(case, outputs)
    assert grad_input.shape == (0, 3)
    assert torch.equal(grad_weight, torch.zeros(5, 3))


def test_only_what_is_asked_for() -> None:
    case = make_case(5, 20, 8, 2)
    full, outputs = run(case), forward(case)
    for asked in ((True, False), (False, True), (False, False)):
        grads = backward(case, outputs, *asked)
        expected = (full.grad_input, full.grad_weight)
        for wanted, grad, e in zip(asked, grads, expected, strict=True):
            assert torch.equal(grad, e) if wanted else grad.shape == (0,)


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
    monkeypatch.setattr(config_triton, "WORKSPACE_BYTES", 1)
    chip = config_triton.Chip(80, 3)
    monkeypatch.setattr(launch_triton, "chip_of", lambda device: chip)
    case = make_case(20, 400, 16, 3, dtypes=(dtype, dtype))
    for first, second in zip(check(case), run(case), strict=True):
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


@pytest.mark.parametrize("name", ["input", "weight"])
def test_float64_is_an_error(name: str) -> None:
    case = make_case(2, 3, 4, 1)
    case = case._replace(**{name: getattr(case, name).double()})
    with pytest.raises(ValueError, match=rf"{name} must be float32.*got torch.float64.*impl='cpu'"):
        forward(case)


def test_the_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers take 80 MiB at most, wherever 128 classes do."""
    chip = config_triton.Chip(90, 132)
    monkeypatch.setattr(launch_triton, "chip_of", lambda device: chip)
    allocated: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format):
                allocated.append(out.nbytes)
            return out

    for n, c, dtypes in (
        (512, 10**6, (BF16, BF16)), (512, 10**6, (F32, F32)), (4096, 10**6, (BF16, BF16)),
        (64, 10**7, (F16, F16)), (512, 10**6, (BF16, F32)),
        # The factor has whole blocks of rows.
        *((n, 10**7, (BF16, BF16)) for n in (1, 8, 129, 192, 600)),
    ):  # fmt: skip
        x, w = (
            torch.empty(r, 64, dtype=t, device="meta") for r, t in zip((n, c), dtypes, strict=True)
        )
        labels = torch.empty(n, 1, dtype=torch.int64, device="meta")
        for module in (launch_triton, operands_triton):
            monkeypatch.setattr(module, "launch", lambda *_, **__: None)
        given = ForwardInputs(x, w, None, labels, 64.0, math.inf, True, False)
        found = launch_triton.forward(given)
        known = given._asdict() | found._asdict()
        known |= {f"grad_{name}": value for name, value in found._asdict().items()}
        inputs = BackwardInputs(**{name: known[name] for name in BackwardInputs._fields})
        allocated.clear()
        with Count():
            launch_triton.backward(inputs, True)
        own = x.nbytes + w.nbytes  # the gradients
        others = 16 * n * 64 * 4  # copies of the input, its gradient's sums
        assert sum(allocated) <= own + others + (80 << 20) * 1.02, (n, c, dtypes)
