"""Row updates: the definition against torch.optim, the kernel against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels._load import cpu_isas
from synface_kernels.ops.row_update import reference
from synface_kernels.testing import assert_as_exact_as_torch
from tests.helpers.cpu import cpu

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPS = torch.ops.synface_kernels

SGD: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "dampening": 0.3},
]
ADAMW: list[dict[str, Any]] = [
    {},
    {"lr": 0.01, "weight_decay": 0.0},
    {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3},
    {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.5)},  # moments whose quotient grows
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=F64).to(dtype)


class Rows:
    """A weight with its optimizer's states, updated by rows."""

    def __init__(self, weight: Tensor, options: dict[str, Any], adamw: bool, **more: Any) -> None:
        self.weight, self.options, self.adamw, self.more = weight.clone(), options, adamw, more
        stored = more.pop("state_dtype", F64 if weight.dtype == F64 else F32)
        count = 2 if adamw else int(options.get("momentum", 0) > 0)
        self.states = [torch.zeros(weight.shape, dtype=stored) for _ in range(count)]
        lazy = more.pop("lazy", None)
        self.last_step = None if lazy is None else torch.zeros(weight.shape[0], dtype=lazy)

    def step(self, grad: Tensor | None, ids: Tensor, step: int) -> None:
        shared = self.options | self.more | {"last_step": self.last_step}
        if self.adamw:
            sk.row_adamw_(self.weight, grad, ids, *self.states, step, **shared)
        else:
            buffer = self.states[0] if self.states else None
            sk.row_sgd_(self.weight, grad, ids, momentum_buffer=buffer, step=step, **shared)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.states]


class Dense:
    """A weight updated by torch.optim, with zero gradients for the other rows."""

    def __init__(self, weight: Tensor, options: dict[str, Any], adamw: bool) -> None:
        self.weight = weight.clone().requires_grad_()
        kind = torch.optim.AdamW if adamw else torch.optim.SGD
        self.optimizer = kind([self.weight], **options)
        if not adamw and options.get("dampening"):  # ours takes 1 − dampening of the first step too
            self.optimizer.state[self.weight]["momentum_buffer"] = torch.zeros_like(weight)

    def step(self, grad: Tensor, ids: Tensor) -> None:
        self.weight.grad = torch.zeros_like(self.weight).index_copy_(0, ids, grad)
        self.optimizer.step()

    @property
    def tensors(self) -> list[Tensor]:
        state = self.optimizer.state[self.weight]
        names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
        return [self.weight.detach(), *(state[n] for n in names if state.get(n) is not None)]


CASES = [(options, False) for options in SGD] + [(options, True) for options in ADAMW]
each_case = pytest.mark.parametrize(("options", "adamw"), CASES)


# ---- all rows, as torch.optim --------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_all_rows_are_torchs_step(options: dict[str, Any], adamw: bool, impl: str) -> None:
    weight, ids = normal(7, 37, seed=0), torch.arange(7)
    exact, theirs = Dense(weight, options, adamw), Dense(weight.float(), options, adamw)
    double = Rows(weight, options, adamw, impl=impl)
    single = Rows(weight.float(), options, adamw, impl=impl)
    for step in range(1, 9):
        grad = normal(7, 37, seed=step, dtype=F32)
        exact.step(grad.double(), ids)
        theirs.step(grad, ids)
        double.step(grad.double(), ids, step)
        single.step(grad, ids, step)
    for ours, plain, truth, torchs in zip(
        double.tensors, single.tensors, exact.tensors, theirs.tensors, strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-14)
        assert_as_exact_as_torch(plain, truth, torchs, atol=3e-7)


@each_case
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "grad_dtype", "seed"),
    [
        (F32, F32, F32, None),
        (F32, BF16, BF16, 11),
        (BF16, F32, F16, 2**63 - 1),
        (BF16, BF16, F32, 0),
        (BF16, BF16, BF16, None),
        (F64, F64, F64, None),
    ],
)
def test_the_kernel_gives_the_definitions_bits(
    options: dict[str, Any], adamw: bool, dtype: Any, state_dtype: Any, grad_dtype: Any, seed: Any
) -> None:
    """Every instruction set and number of threads gives the same bits; other rows are unchanged."""
    c, d, touched = 200, 259, 150
    weight = normal(c, d, seed=0, dtype=dtype)

    def run(impl: str) -> list[Tensor]:
        rows = Rows(weight, options, adamw, impl=impl, state_dtype=state_dtype, seed=seed)
        for step in range(1, 3):
            ids = torch.randperm(c, generator=seeded(step))[:touched].sort().values
            before = [t.clone() for t in rows.tensors]
            rows.step(normal(touched, d, seed=step, dtype=grad_dtype), ids, step)
            others = torch.ones(c, dtype=torch.bool).index_fill_(0, ids, False)
            for old, new in zip(before, rows.tensors, strict=True):
                assert torch.equal(old[others], new[others])
            assert not torch.equal(before[0][ids], rows.weight[ids])
        return rows.tensors

    expected = run("reference")
    for isa, threads in zip(cpu_isas(), (1, 1, 3), strict=False):
        with cpu(isa, threads):
            got = run("cpu")
        for ours, definition in zip(got, expected, strict=True):
            if adamw and dtype == F64:  # torch's float64 root may be off by a bit
                torch.testing.assert_close(ours, definition, rtol=1e-15, atol=1e-17)
            else:
                assert torch.equal(ours, definition)


def test_rows_with_gaps_and_one_column() -> None:
    for d in (1, 5, 16):
        grad, ids = normal(3, 2 * d, seed=1, dtype=F32)[:, ::2], torch.tensor([0, 2, 5])
        wide = normal(6, d + 3, seed=0, dtype=F32)
        expected = sk.row_sgd_(wide[:, :d].clone(), grad, ids, lr=0.5, impl="reference")
        rest = wide[:, d:].clone()
        assert torch.equal(sk.row_sgd_(wide[:, :d], grad, ids, lr=0.5, impl="cpu"), expected)
        assert torch.equal(wide[:, d:], rest)


def test_no_rows() -> None:
    weight, none = normal(4, 3, seed=0), torch.empty(0, dtype=torch.int64)
    for impl in ("cpu", "reference"):
        got = sk.row_sgd_(
            weight.clone(), weight[:0], none, lr=1.0, step=3, last_step=torch.zeros(4).int(),
            impl=impl,
        )  # fmt: skip
        assert torch.equal(got, weight)


# ---- rows that catch up --------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("last_dtype", [torch.int64, torch.int32])
def test_rows_that_catch_up_are_those_of_a_dense_optimizer(
    options: dict[str, Any], adamw: bool, last_dtype: torch.dtype
) -> None:
    c, d, steps = 11, 9, 70
    weight = normal(c, d, seed=0)
    exact, theirs = Dense(weight, options, adamw), Dense(weight.float(), options, adamw)
    lazy = [
        Rows(weight.to(dtype), options, adamw, impl=impl, lazy=last_dtype)
        for dtype, impl in ((F64, "cpu"), (F64, "reference"), (F32, "cpu"))
    ]
    for step in range(1, steps + 1):
        rng = seeded(step)
        count = int(torch.randint(0, 3, (), generator=rng))  # often none at all
        ids = torch.randperm(c - 1, generator=rng)[:count].sort().values  # the last one never
        grad = normal(count, d, seed=step, dtype=F32)
        exact.step(grad.double(), ids)
        theirs.step(grad, ids)
        for rows in lazy:
            rows.step(grad.to(rows.weight.dtype), ids, step)
    for rows in lazy:
        rows.step(None, torch.arange(c), steps)  # the rest of the way, without gradients
        assert rows.last_step is not None
        assert (rows.last_step == steps).all()
    for kernel, definition, single, truth, torchs in zip(
        *(rows.tensors for rows in lazy), exact.tensors, theirs.tensors, strict=True
    ):
        torch.testing.assert_close(definition, truth, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(kernel, truth, rtol=1e-12, atol=1e-13)
        assert_as_exact_as_torch(single, truth, torchs, atol=1e-6)


@pytest.mark.parametrize("options", SGD)
def test_a_hundred_thousand_missed_steps_of_sgd(options: dict[str, Any]) -> None:
    """The closed form against the matrix of a step, raised in float64 by torch."""
    options = options | {"lr": 1e-3}
    missed, ids = 100_000, torch.tensor([0])
    rows = Rows(normal(1, 8, seed=0), options, False, lazy=torch.int64)
    rows.step(normal(1, 8, seed=1), ids, 1)
    before = [t.clone() for t in rows.tensors]
    rows.step(None, ids, 1 + missed)
    if len(before) == 1:
        factor = (1 - options["lr"] * options.get("weight_decay", 0)) ** missed
        torch.testing.assert_close(rows.weight, before[0] * factor, rtol=1e-10, atol=0)
        return
    columns = []
    for w, b in ((1.0, 0.0), (0.0, 1.0)):  # what one step makes of the unit vectors
        weight, buffer = torch.tensor([[w]], dtype=F64), torch.tensor([[b]], dtype=F64)
        sk.row_sgd_(
            weight, torch.zeros(1, 1, dtype=F64), ids, momentum_buffer=buffer,
            impl="reference", **options,
        )  # fmt: skip
        columns.append(torch.cat([weight, buffer]))
    matrix = torch.linalg.matrix_power(torch.cat(columns, 1), missed)
    expected = torch.einsum("ij,jnd->ind", matrix, torch.stack(before))
    torch.testing.assert_close(torch.stack(rows.tensors), expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("start", [1, 1000])
def test_thousands_of_missed_steps_of_adamw(dtype: torch.dtype, start: int) -> None:
    """The truncated rest of the series is below a rounding error."""
    ids, missed = torch.arange(3), 3000
    for options in ADAMW[:3]:
        results = []
        for kind, impl in ((F64, "reference"), (dtype, "cpu"), (dtype, "reference")):
            rows = Rows(normal(3, 20, seed=0).to(kind), options, True, impl=impl, lazy=torch.int64)
            assert rows.last_step is not None
            rows.last_step.fill_(start - 1)
            rows.step(normal(3, 20, seed=1).to(kind), ids, start)
            rows.step(None, ids, start + missed)
            results.append(rows.weight)
        exact, ours, plain = results
        if dtype == F64:
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)
        else:
            assert_as_exact_as_torch(ours, exact, plain, atol=2e-7)


def test_rows_never_touched_decay_alone_even_without_eps() -> None:
    weight = normal(2, 4, seed=0)
    zeros = [torch.zeros_like(weight) for _ in range(2)]
    got = sk.row_adamw_(
        weight.clone(), None, torch.arange(2), *zeros, 10, lr=0.1, weight_decay=0.5, eps=0.0,
        last_step=torch.zeros(2, dtype=torch.int64), impl="cpu",
    )  # fmt: skip
    torch.testing.assert_close(got, weight * 0.95**10)


def test_a_bound_where_the_series_of_missed_steps_does_not_fall() -> None:
    """A closed form takes 2^31 missed steps, or they are refused; no loop takes them one by one."""

    def catch_up(missed: int, dtype: torch.dtype = F32, **options: Any) -> Tensor:
        weight, m = normal(2, 8, seed=0, dtype=dtype), normal(2, 8, seed=1, dtype=dtype)
        last = torch.zeros(2, dtype=torch.int64)
        return sk.row_adamw_(
            weight, None, torch.arange(2), m, m.square(), missed, last_step=last, weight_decay=0.0,
            **options,
        )  # fmt: skip

    for dtype in (F32, F64):
        for betas in ((0.9, 0.999), (0.0, 0.0), (0.0, 0.9)):
            torch.testing.assert_close(
                catch_up(2**31, dtype, betas=betas), catch_up(2**16, dtype, betas=betas),
            )  # fmt: skip
        # With β₂ = 0 the denominator is eps alone: Σ lr·β₁ᵏ/(1 − β₁ᵏ)/eps.
        beta, many = 0.9999999, 2**17
        power = beta ** torch.arange(1, many + 1, dtype=F64)
        got = catch_up(many, dtype, betas=(beta, 0.0), eps=1e3)
        expected = normal(2, 8, seed=0) - normal(2, 8, seed=1) * 1e-6 * (power / (1 - power)).sum()
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        for betas in ((beta, 0.5), (0.99999, 0.99999)):
            with pytest.raises(ValueError, match=f"missed at most {many} steps.*got {2**31} at 0"):
                catch_up(2**31, dtype, betas=betas)


# ---- stochastic rounding -------------------------------------------------------------------------


def test_stochastic_rounding_has_no_bias() -> None:
    """The mean of many roundings is the value, for fractions of all sizes, signs and exponents."""
    rows, columns = 3000, 64
    fraction = (torch.arange(columns) + 0.5) / columns
    for scale in (1.0, -1.0, 2.0**-20, -(2.0**30)):
        value = ((1 + fraction * 2.0**-7) * scale).float()
        weight = torch.full((rows, columns), scale, dtype=BF16)
        # w − lr·g with g = w − value is the value, exactly
        grad = (weight.float() - value).contiguous()
        sk.row_sgd_(weight, grad, torch.arange(rows), lr=1.0, step=1, seed=3)
        up = (weight.float() != scale).double().mean(0)
        low, high = torch.tensor(scale).bfloat16(), torch.tensor(scale * (1 + 2.0**-7)).bfloat16()
        assert set(weight.flatten().tolist()) == {low.item(), high.item()}
        sigma = (fraction * (1 - fraction) / rows).sqrt()
        z = (up - fraction) / sigma
        assert z.abs().max() < 4.5
        assert 0.5 < z.square().mean() < 1.6


def test_random_bits_are_even_and_differ() -> None:
    ids = torch.arange(400)
    keys = reference.row_keys(5, 7, 0, ids)
    bits = reference.random_bits(keys, 512)
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**16
    for shift in (0, 4, 8, 12):
        counts = torch.bincount((bits >> shift & 15).flatten(), minlength=16).double()
        expected = bits.numel() / 16
        assert ((counts - expected) ** 2 / expected).sum() < 45  # 15 degrees of freedom, p = 1e-4
    centered = bits.double() - bits.double().mean()
    scale = centered.square().mean()
    for a, b in ((centered[1:], centered[:-1]), (centered[:, 1:], centered[:, :-1])):
        assert ((a * b).mean() / scale).abs() < 5 / a.numel() ** 0.5
    for other in ((6, 7, 0), (5, 8, 0), (5, 7, 1)):
        others = reference.random_bits(reference.row_keys(*other, ids), 512).double()
        correlation = (centered * (others - others.mean())).mean() / scale
        assert correlation.abs() < 5 / centered.numel() ** 0.5


def test_small_steps_are_not_lost() -> None:
    """A hundred steps of 2^-12 of the weight are lost by rounding to nearest."""
    steps, spacing = 100, 2.0**-8  # of bfloat16 just below 1
    chance = 2.0**-12 / spacing
    sigma = spacing * (steps * chance * (1 - chance) / 64**2) ** 0.5
    ids, grad = torch.arange(64), torch.full((64, 64), 2.0**-12)
    nearest, random = (torch.ones(64, 64, dtype=BF16) for _ in range(2))
    for step in range(1, steps + 1):
        sk.row_sgd_(nearest, grad, ids, lr=1.0, step=step)
        sk.row_sgd_(random, grad, ids, lr=1.0, step=step, seed=1)
    assert (nearest == 1).all()
    assert abs(random.double().mean() - (1 - steps * 2.0**-12)) < 4 * sigma


def test_stochastic_rounding_of_exact_and_non_finite_values() -> None:
    values = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, -3.5]])
    for impl in ("cpu", "reference"):
        weight = torch.zeros_like(values).bfloat16()
        got = sk.row_sgd_(weight, -values, torch.tensor([0]), lr=1.0, step=1, seed=0, impl=impl)
        torch.testing.assert_close(got.float(), values, rtol=0, atol=0, equal_nan=True)


def test_the_same_seed_gives_the_same_bits() -> None:
    def run(seed: int, first: int) -> Tensor:
        rows = Rows(normal(50, 40, seed=0, dtype=BF16), SGD[3], False, seed=seed, state_dtype=BF16)
        for step in range(first, first + 3):
            rows.step(normal(50, 40, seed=step, dtype=F32), torch.arange(50), step)
        return rows.weight

    assert torch.equal(run(1, 1), run(1, 1))
    assert not torch.equal(run(1, 1), run(2, 1))


# ---- torch's machinery ---------------------------------------------------------------------------


def test_opcheck() -> None:
    ids, last = torch.tensor([1, 4]), torch.zeros(6, dtype=torch.int64)
    for dtype in (F32, BF16):
        weight, a, b = (normal(6, 5, seed=s, dtype=dtype).abs() for s in range(3))
        grad = normal(2, 5, seed=3, dtype=F32)
        for given, row_grad, seed in ((None, grad, None), (last, None, 4)):
            torch.library.opcheck(
                OPS.row_update_sgd,
                (weight, row_grad, ids, a, given, 0.1, 0.9, 0.1, 0.0, True, 3, seed, "cpu"),
            )
            torch.library.opcheck(
                OPS.row_update_adamw,
                (weight, row_grad, ids, a, b, given, 0.1, 0.9, 0.99, 1e-8, 0.1, 3, seed, "cpu"),
            )
        torch.library.opcheck(
            OPS.row_update_sgd,
            (weight, grad, ids, None, None, 0.1, 0.0, 0.1, 0.0, False, 0, None, "cpu"),
        )


def test_compiles_without_breaks() -> None:
    def step(weight: Tensor, grad: Tensor, ids: Tensor, buffer: Tensor) -> Tensor:
        return 2 * sk.row_sgd_(weight, grad, ids, lr=0.1, momentum_buffer=buffer, momentum=0.9)

    weight, grad, ids = normal(6, 4, seed=0), normal(2, 4, seed=1), torch.tensor([0, 5])
    states = [(weight.clone(), torch.zeros_like(weight)) for _ in range(2)]
    expected = step(states[0][0], grad, ids, states[0][1])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(states[1][0], grad, ids, states[1][1]), expected)
    assert torch.equal(states[1][0], states[0][0])
    assert torch.equal(states[1][1], states[0][1])


def test_autograd_knows_that_the_weight_was_written() -> None:
    weight = torch.nn.Parameter(normal(4, 3, seed=0))
    loss = weight.square().sum()
    sk.row_sgd_(weight, torch.ones(1, 3, dtype=F64), torch.tensor([2]), lr=1.0)
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_sampled_training_step() -> None:
    """Sampling, the loss on the sampled rows, and their update: the loss falls."""
    x, target = normal(32, 16, seed=0, dtype=F32), torch.arange(32) * 7
    weight, buffer = normal(1000, 16, seed=1, dtype=F32), torch.zeros(1000, 16)
    last, rng, losses = torch.zeros(1000, dtype=torch.int32), seeded(2), []
    for step in range(1, 31):
        ids, remapped = sk.sample_classes(target, 1000, 200, rng)
        sampled = weight[ids].requires_grad_()
        loss = sk.margin_cross_entropy(x, sampled, remapped)
        loss.backward()
        losses.append(loss.item())
        sk.row_sgd_(
            weight, sampled.grad, ids, lr=1.0, momentum_buffer=buffer, momentum=0.9,
            weight_decay=5e-4, step=step, last_step=last,
        )  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]


# ---- bad input -----------------------------------------------------------------------------------


W, G, IDS = torch.ones(5, 3), torch.ones(2, 3), torch.tensor([1, 3])
LAST = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": [1]}, TypeError, "weight must be a tensor, got list"),
        ({"weight": W.half()}, ValueError, r"weight must be float32, bfloat16 .* float16"),
        ({"weight": W[0]}, ValueError, r"of shape \(C, D\), got float32 \(3,\)"),
        ({"weight": torch.ones(3, 5).T}, ValueError, "weight must have contiguous rows"),
        ({"row_grad": G[:1]}, ValueError, r"row_grad must be .* \(S, D\) = \(2, 3\).* \(1, 3\)"),
        ({"row_grad": G.double()}, ValueError, "row_grad must be float32, bfloat16 or float16"),
        ({"row_grad": None}, ValueError, "row_grad may be None only with last_step"),
        ({"class_ids": IDS.int()}, ValueError, r"class_ids must be int64 .* got int32 \(2,\)"),
        ({"class_ids": torch.tensor([3, 1])}, ValueError, "class_ids must rise .* got 1 at 1"),
        ({"class_ids": torch.tensor([3, 3])}, ValueError, "class_ids must rise .* got 3 at 1"),
        ({"class_ids": torch.tensor([3, 5])}, ValueError, r"class_ids must be in \[0, 5\), got 5"),
        ({"class_ids": torch.tensor([-1, 2])}, ValueError, r"in \[0, 5\), got -1"),
        ({"lr": -0.1}, ValueError, "lr must be finite and ≥ 0, got -0.1"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got str"),
        ({"momentum": 0.9}, ValueError, "momentum_buffer is required just where momentum > 0"),
        ({"momentum_buffer": W.clone()}, ValueError, "momentum_buffer is required just where"),
        ({"momentum_buffer": W[:2].clone(), "momentum": 0.9}, ValueError,
         r"momentum_buffer must be .* \(5, 3\) like weight, got float32 \(2, 3\)"),
        ({"nesterov": True}, ValueError, "nesterov needs momentum > 0 and dampening = 0"),
        ({"last_step": LAST}, ValueError, "step is required with last_step or seed"),
        ({"seed": 3}, ValueError, "step is required with last_step or seed"),
        ({"seed": -3, "step": 1}, ValueError, "seed must be in"),
        ({"step": 0}, ValueError, "step must be in"),
        ({"step": 1.0}, TypeError, "step must be an int, got float"),
        ({"last_step": LAST.float(), "step": 1}, ValueError, "last_step must be int64 or int32"),
        ({"last_step": LAST[:4], "step": 1}, ValueError, r"with C = 5, got int64 \(4,\)"),
        ({"last_step": LAST + 2, "step": 2}, ValueError,
         r"last_step of the rows .* must be in \[0, 1\] at step 2, got 2 at 0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    weight = W.clone()
    arguments: dict[str, Any] = {"weight": weight, "row_grad": G, "class_ids": IDS, "lr": 0.1}
    with pytest.raises(error, match=message):
        sk.row_sgd_(**arguments | change)
    assert torch.equal(weight, W)


def test_memory_that_overlaps() -> None:
    """Overlaps are refused by name before a write; columns of one matrix do not overlap."""
    memory = torch.arange(1.0, 41.0)
    before = memory.clone()
    w = memory[:15].view(5, 3)
    others = {"momentum_buffer": torch.ones(5, 3), "momentum": 0.9, "step": 1, "last_step": LAST}
    as_int64 = memory.view(torch.int64)
    for change, message in (
        ({"weight": memory[:3].expand(5, 3)}, "weight must not overlap itself: more than one"),
        ({"weight": memory.as_strided((5, 3), (2, 1))}, "weight must not overlap itself"),
        ({"momentum_buffer": torch.ones(1, 3).expand(5, 3)},
         "momentum_buffer must not overlap itself"),
        ({"momentum_buffer": w}, "weight must not share memory with momentum_buffer"),
        ({"momentum_buffer": memory[14:29].view(5, 3)}, "weight must not share .* momentum_buffer"),
        ({"weight": memory[:20].view(5, 4)[:, :3],
          "momentum_buffer": memory[2:22].view(5, 4)[:, :3]}, "single memory location"),
        ({"last_step": as_int64[:5]}, "weight must not share memory with last_step"),
        ({"row_grad": w[1:3]}, "weight must not share memory with row_grad"),
        ({"class_ids": as_int64[7:8]}, "weight must not share memory with class_ids"),
    ):  # fmt: skip
        arguments: dict[str, Any] = {"weight": w, "row_grad": G, "class_ids": IDS, "lr": 0.1}
        arguments |= others | change
        if "class_ids" in change:
            arguments["row_grad"] = G[:1]
        for impl in ("cpu", "reference"):
            with pytest.raises(ValueError, match=message):
                sk.row_sgd_(**arguments, impl=impl)
            assert torch.equal(memory, before)
    adamw = {"exp_avg": w, "exp_avg_sq": torch.ones(5, 3), "step": 1}
    with pytest.raises(ValueError, match="exp_avg must not share memory with exp_avg_sq"):
        sk.row_adamw_(torch.ones(5, 3), G, IDS, **adamw | {"exp_avg_sq": w})
    # Weight and momentum side by side in one matrix, and gradients that repeat a row, are fine.
    both = torch.ones(5, 6)
    got = sk.row_sgd_(both[:, :3], G[:1].expand(2, 3), IDS, lr=0.1, momentum=0.9,
                      momentum_buffer=both[:, 3:])  # fmt: skip
    apart = torch.ones(5, 3)
    expected = sk.row_sgd_(apart, G, IDS, lr=0.1, momentum=0.9, momentum_buffer=torch.ones(5, 3))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, TypeError, "betas must be a pair"),
        ({"eps": -1.0}, ValueError, "eps must be finite and ≥ 0"),
        ({"step": None}, TypeError, "step must be an int"),
        ({"exp_avg": None}, TypeError, "exp_avg must be a tensor"),
        ({"exp_avg_sq": W.double()}, ValueError, "exp_avg_sq must be float32 or bfloat16 of shape"),
    ],
)
def test_bad_input_of_adamw(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "weight": W.clone(), "row_grad": G, "class_ids": IDS, "exp_avg": torch.zeros(5, 3),
        "exp_avg_sq": torch.zeros(5, 3), "step": 1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        sk.row_adamw_(**arguments | change)


def test_vmap_is_refused() -> None:
    weights, gradients = torch.ones(2, 5, 3), torch.ones(2, 2, 3)
    with pytest.raises(
        NotImplementedError, match=r"row_sgd_ .*torch\.vmap.* loop over the matrices"
    ):
        torch.vmap(lambda w, g: sk.row_sgd_(w, g, IDS, lr=0.1))(weights, gradients)
    assert (weights == 1).all()
