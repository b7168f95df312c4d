"""Class sampling against its definition, and the definition against its distribution."""

import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2, chisquare
from torch import Tensor

import synface_kernels as sk
from synface_kernels._load import cpu_isas
from synface_kernels.ops.sample_classes import kernel_torch, reference
from synface_kernels.testing import status
from tests.helpers.cpu import cpu
from tests.helpers.forked import numbers_of

ROOT = Path(__file__).parents[2]
IMPLS = ("cpu", "torch", "reference")
P_LEAST = 1e-4  # seeds are fixed, so a test passes always or never


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(ids: Tensor, remapped: Tensor, target: Tensor, num_classes: int, wanted: int) -> None:
    counted = target != -100
    assert ids.dtype == remapped.dtype == torch.int64
    assert (ids[1:] > ids[:-1]).all()
    assert ((ids >= 0) & (ids < num_classes)).all()
    assert ids.numel() == max(wanted, target[counted].unique().numel())
    assert remapped.shape == target.shape
    assert torch.equal(ids[remapped[counted]], target[counted])
    assert (remapped[~counted] == -100).all()


# ---- the definition ------------------------------------------------------------------------------


def test_the_stream_is_splitmix64() -> None:
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0
    assert [reference.draw(0, i, 2**64) for i in range(3)] == known
    for num_classes in (1, 2, 1000, 10_000_000, 2**31 - 1):
        seed = 0x7123456789ABCDEF
        draws = kernel_torch._draws(torch.tensor(seed), 500, num_classes)
        assert draws.tolist() == [reference.draw(seed, i, num_classes) for i in range(500)]


@pytest.mark.parametrize("num_classes", [1, 2, 3, 7, 64, 65, 130, 1000])
def test_implementations_agree(num_classes: int) -> None:
    c = num_classes
    for labels in (0, 1, 3, 17, 200):
        target = torch.randint(c, (labels,), generator=seeded(labels))
        target[:1] = -100
        for wanted in {w for w in (1, 2, c // 3, c // 2, c // 2 + 1, c - 1, c) if 1 <= w <= c}:
            results = [
                sk.sample_classes(target, c, wanted, seeded(wanted), impl=impl) for impl in IMPLS
            ]
            check(*results[-1], target, c, wanted)
            for ids, remapped in results[:-1]:
                assert torch.equal(ids, results[-1][0]), (labels, wanted)
                assert torch.equal(remapped, results[-1][1]), (labels, wanted)


@pytest.mark.parametrize("wanted", [1_000, 90_000, 100_050, 150_000])
def test_every_instruction_set_and_number_of_threads_agrees(wanted: int) -> None:
    """C = 200,000, and 100,050 where the torch code has to count the positives first."""
    target = torch.randint(200_000, (256, 2), generator=seeded(0))
    expected = sk.sample_classes(target, 200_000, wanted, seeded(1), impl="torch")
    check(*expected, target, 200_000, wanted)
    for isa in cpu_isas():
        for threads in (1, 2, 3):
            with cpu(isa, threads):
                got = sk.sample_classes(target, 200_000, wanted, seeded(1), impl="cpu")
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])


def test_ten_million_classes() -> None:
    c, wanted = 10_000_000, 100_000
    target = torch.randint(c, (512,), generator=seeded(0))
    ids, remapped = sk.sample_classes(target, c, wanted, seeded(1))
    check(ids, remapped, target, c, wanted)
    bins = torch.bincount(ids // 10_000, minlength=1000)  # nearly Poisson
    assert chisquare(bins.numpy()).pvalue > P_LEAST


def test_any_layout_and_ignore_index() -> None:
    target = torch.randint(50, (6, 8), generator=seeded(0))
    target[2] = -1
    for view in (target, target.T, target[::2, ::3]):
        for impl in IMPLS:
            ids, remapped = sk.sample_classes(view, 50, 40, seeded(2), ignore_index=-1, impl=impl)
            assert torch.equal(ids[remapped[view != -1]], view[view != -1])
            assert (remapped[view == -1] == -1).all()
            assert ids.numel() == 40


# ---- the distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [2, 3, 4, 5, 6])
def test_every_set_of_negatives_is_as_likely(wanted: int) -> None:
    """All sets are equally likely, for C = 7 with two positives."""
    target = torch.tensor([4, 1, 4, -100])
    negatives = [0, 2, 3, 5, 6]
    rng = seeded(wanted)
    counts = Counter(
        tuple(sk.sample_classes(target, 7, wanted, rng)[0].tolist()) for _ in range(6000)
    )
    sets = [tuple(sorted((1, 4, *rest))) for rest in combinations(negatives, wanted - 2)]
    assert set(counts) == set(sets)
    if len(sets) > 1:
        assert chisquare([counts[s] for s in sets]).pvalue > P_LEAST


@pytest.mark.parametrize("wanted", [60, 400, 470])
def test_every_negative_is_as_likely(wanted: int) -> None:
    c, draws = 500, 4000
    target = torch.arange(0, 50, 5)
    counts = torch.zeros(c, dtype=torch.int64)
    rng = seeded(wanted)
    for _ in range(draws):
        counts[sk.sample_classes(target, c, wanted, rng)[0]] += 1
    assert (counts[target] == draws).all()
    counts[target] = -1
    negatives = counts[counts >= 0].double()
    n = negatives.numel()
    p = (wanted - target.numel()) / n
    assert negatives.sum() == draws * (wanted - target.numel())
    statistic = ((negatives - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n
    assert chi2.sf(float(statistic), n - 1) > P_LEAST
    assert chi2.cdf(float(statistic), n - 1) > P_LEAST  # nor more even than chance is


def test_pairs_are_as_likely() -> None:
    """Adjacent classes are sampled independently."""
    target = torch.empty(0, dtype=torch.int64)
    rng, together = seeded(5), 0
    for _ in range(4000):
        ids, _ = sk.sample_classes(target, 64, 16, rng)
        together += int((ids[1:] - ids[:-1] == 1).sum())
    expected = 4000 * 63 * (16 * 15) / (64 * 63)
    assert abs(together - expected) < 5 * expected**0.5


# ---- what a trainer relies on --------------------------------------------------------------------


def test_the_generator_alone_decides() -> None:
    target = torch.arange(10)
    first, second = (seeded(7) for _ in range(2))
    a = [sk.sample_classes(target, 10_000, 100, first)[0] for _ in range(2)]
    torch.manual_seed(99)
    b = [sk.sample_classes(target, 10_000, 100, second)[0] for _ in range(2)]
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], a[1])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        by_default = sk.sample_classes(target, 10_000, 100)[0]
        torch.manual_seed(3)
        assert torch.equal(sk.sample_classes(target, 10_000, 100)[0], by_default)


def test_more_positives_than_wanted() -> None:
    target = torch.tensor([[5, 9], [1, 5], [-100, 7]])
    for impl in IMPLS:
        ids, remapped = sk.sample_classes(target, 12, 2, seeded(0), impl=impl)
        assert ids.tolist() == [1, 5, 7, 9]
        assert remapped.tolist() == [[1, 3], [0, 1], [-100, 2]]


def test_the_sampled_loss_is_that_of_the_sampled_centers() -> None:
    x, w = torch.randn(8, 16, generator=seeded(0)), torch.randn(300, 16, generator=seeded(1))
    target = torch.randint(300, (8,), generator=seeded(2))
    ids, remapped = sk.sample_classes(target, 300, 40, seeded(3))
    loss = sk.margin_cross_entropy(x, w[ids], remapped)
    cosine = torch.cosine_similarity(x[:, None].double(), w[None].double(), dim=2)
    logits = 64 * cosine
    at = (torch.arange(8), target)
    logits[at] = 64 * (cosine[at].acos() + 0.5).cos()
    expected = torch.nn.functional.cross_entropy(logits[:, ids], remapped)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def print_growth() -> None:
    """Print by how many bytes a draw from 200 million classes raises the peak of all memory."""
    torch.set_num_threads(1)
    target = torch.arange(512)
    for _ in range(2):
        sk.sample_classes(target, 10_000, 1_000, impl="cpu")
    before = status("VmPeak")
    sk.sample_classes(target, 200_000_000, 1_000, impl="cpu")
    print(status("VmPeak") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_bit_per_class(tmp_path: Path) -> None:
    """200 million classes: a byte each would be 200 MB, a bit each is 25 MB."""
    (grown,) = numbers_of(tmp_path / "shown", print_growth)
    assert grown < 27 << 20


def test_compiles_without_breaks() -> None:
    def step(target: Tensor) -> tuple[Tensor, Tensor]:
        return sk.sample_classes(target, 1000, 100)

    target = torch.arange(0, 60, 2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    check(*compiled(target), target, 1000, 100)


def test_opcheck() -> None:
    seed = torch.tensor(5)
    for target in (torch.arange(6), torch.arange(6).view(3, 2)):
        for impl in ("cpu", "torch"):
            for wanted in (8, 90):
                torch.library.opcheck(
                    torch.ops.synface_kernels.sample_classes_draw,
                    (target, 100, wanted, seed, -100, impl),
                )
    torch.library.opcheck(  # as many as there are positives
        torch.ops.synface_kernels.sample_classes_draw, (torch.arange(6), 100, 2, seed, -100, "cpu")
    )


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": [1, 2]}, TypeError, "target must be a tensor, got list"),
        ({"target": torch.tensor([1.0])}, ValueError, r"target must be int64 .* float32 \(1,\)"),
        ({"target": torch.zeros(2, 2, 2).long()}, ValueError, r"\(N,\) or \(N, K\)"),
        ({"target": torch.tensor([3, 10])}, ValueError, r"in \[0, 10\) or ignore.* got 10 at 1"),
        ({"target": torch.tensor([[3, 4], [5, -1]])}, ValueError, r"got -1 at \(1, 1\)"),
        ({"num_classes": 0}, ValueError, r"num_classes must be in \[1, 2\^31\), got 0"),
        ({"num_classes": 2**31}, ValueError, "num_classes must be in"),
        ({"num_classes": 10.0}, TypeError, "num_classes must be an int, got float"),
        ({"num_sampled": 11}, ValueError, r"num_sampled must be in \[1, 10\] .* got 11"),
        ({"num_sampled": 0}, ValueError, r"num_sampled must be in \[1, 10\]"),
        ({"num_sampled": True}, TypeError, "num_sampled must be an int, got bool"),
        ({"ignore_index": 0}, ValueError, r"ignore_index must not be a class.*\[0, 10\).* got 0"),
        ({"ignore_index": 9}, ValueError, "ignore_index must not be a class"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"impl": "triton"}, ValueError, "impl must be one of"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"target": torch.tensor([1, 2]), "num_classes": 10,
                                 "num_sampled": 4} | change  # fmt: skip
    with pytest.raises(error, match=message):
        sk.sample_classes(**arguments)


def test_the_kernel_itself_keeps_within_its_memory() -> None:
    with pytest.raises((IndexError, ValueError, RuntimeError), match="target must be in"):
        torch.ops.synface_kernels.sample_classes_cpu(torch.tensor([64]), 64, 4, 0, -100)
