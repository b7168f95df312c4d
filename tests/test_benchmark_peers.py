"""The peers of the benchmarks compute what they claim to."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import synface_kernels as sk
from benchmarks import (
    margin_peers,
    peers,
    workloads,
)
from benchmarks.cases import (
    CASES,
    HEADLINES,
    STEPS,
    cases,
    domain_mixup,
    hypersphere_repulsion,
)

CPU = torch.device("cpu")
OPS = list(CASES)
MARGIN, MIXUP = "margin_cross_entropy", "domain_mixup"
REPULSION = "hypersphere_repulsion"


def dry(op: str):
    return cases("dry", op)[0]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_of_each_suite_and_peers(op):
    for suite in ("dry", "cpu", "gpu"):
        found = cases(suite, op)
        assert found
        assert len({case.name for case in found}) == len(found)
    assert peers.PEERS[op][0].name == "ours"
    assert op in workloads.WORKLOADS
    assert op in STEPS
    assert 1 <= HEADLINES[op] <= len(cases("cpu", op))


def test_margin_flops_and_bytes_are_those_of_the_three_gemms():
    case = dry(MARGIN)
    work = workloads.MarginWorkload(case, CPU)
    step = peers.find(MARGIN, "three products").build(work)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == case.flops
    x, w = work.input.nbytes, work.weight.nbytes
    assert case.bytes == 2 * w + work.buffers["grad_weight"].nbytes + 2 * x + work.target.nbytes


OTHERS = [
    peer.name
    for peer in peers.PEERS[MARGIN]
    if peer.name not in ("three products", "F.linear_cross_entropy", "Liger", "CCE")
]
# A cosine of bfloat16 factors, each rounded once or twice, times the scale, may be off by so much.
ROUNDED = 64 * 2**-7


@pytest.mark.parametrize("case", cases("dry", MARGIN)[:4], ids=lambda case: case.name)
@pytest.mark.parametrize("name", OTHERS)
def test_margin_peers_against_float64(name, case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    if name == "pytorch-metric-learning":
        pytest.importorskip("pytorch_metric_learning")
    work = workloads.MarginWorkload(case, CPU)
    exact = [v.detach().double().requires_grad_() for v in (work.input, work.weight)]
    margin = sk.ArcFace(peers.SCALE, peers.MARGIN)
    expected = sk.margin_cross_entropy(*exact, work.target, margin, impl="reference")
    expected.backward()
    loss = peers.find(MARGIN, name).build(work)()
    weight_grad = next(p.grad for p in reversed(work.parameters) if p.grad is not None)
    if weight_grad.shape != work.weight.shape:
        weight_grad = weight_grad.T
    exactly = case.gemm_dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), expected, rtol=1e-5, atol=1e-5 if exactly else ROUNDED
    )
    for grad, wanted in ((work.input.grad, exact[0].grad), (weight_grad, exact[1].grad)):
        error = (grad.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if exactly else 0.1), (name, error)


def test_sampled_peers_have_the_gradient_of_the_sampled_classes():
    case = cases("dry", MARGIN)[-1]
    work = workloads.MarginWorkload(case, CPU)
    ids, labels = margin_peers.sample(work.target, len(work.weight), work.sampled)
    assert len(ids) == work.sampled == case.shape["S"]
    assert torch.equal(ids[labels], work.target)
    exact = [v.detach().double().requires_grad_() for v in (work.input, work.weight)]
    sk.margin_cross_entropy(
        *exact, labels, sk.ArcFace(), class_ids=ids, impl="reference"
    ).backward()
    margin_peers.partial_fc(work.input, work.weight, labels, ids).backward()
    torch.testing.assert_close(work.input.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-6)
    dense = exact[1].grad.to_dense()
    torch.testing.assert_close(work.weight.grad.double(), dense, rtol=1e-4, atol=1e-6)
    for name in ("ours", "Partial FC's steps", "three products"):
        work.clear_gradients()
        peers.find(MARGIN, name).build(work)()
        if name != "three products":
            touched = work.weight.grad.to_dense().any(1)
            assert 0 < touched.sum() <= work.sampled
    with pytest.raises(NotImplementedError, match="all classes"):
        peers.find(MARGIN, "eager torch").build(work)


def test_chunks_of_rows_agree_with_all_rows():
    work = workloads.MarginWorkload(dry(MARGIN), CPU)
    results = []
    for rows in (1, 5, 16):
        work.clear_gradients()
        loss = margin_peers.Chunked.apply(*work.parameters, work.target, rows, torch.float32)
        (2 * loss).backward()
        results.append((loss.detach(), work.input.grad, work.weight.grad))
    for result in results[1:]:
        for mine, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert margin_peers.rows_per_chunk(1_000_000) == 134
    assert margin_peers.rows_per_chunk(2**40) == 1


@pytest.mark.parametrize("case", cases("dry", "row_update"), ids=lambda case: case.name)
def test_row_update_peers_compute_what_ours_does(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def run(name):
        work = workloads.RowUpdateWorkload(case, CPU)
        peers.find("row_update", name).build(work)()
        return work.weight, *work.states

    tolerance = {"rtol": 2 * torch.finfo(case.torch_dtype).eps, "atol": 1e-6}
    for name in ("eager torch", "torch.compile"):
        for mine, theirs in zip(run("ours"), run(name), strict=True):
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_sampling_peers_sample_what_is_asked():
    case = dry("sample_classes")
    work = workloads.SampleWorkload(case, CPU)
    for name in ("ours", "insightface's"):
        ids = peers.find("sample_classes", name).build(work)()
        assert len(ids) == len(ids.unique()) == case.shape["S"]
        assert torch.isin(work.target, ids).all()


def test_floor_reuses_its_outputs():
    work = workloads.MarginWorkload(dry(MARGIN), CPU)
    step = peers.find(MARGIN, "three products").build(work)
    step()
    before = {name: buffer.data_ptr() for name, buffer in work.buffers.items()}
    step()
    assert {name: buffer.data_ptr() for name, buffer in work.buffers.items()} == before
    torch.testing.assert_close(work.buffers["logits"], work.input.detach() @ work.weight.detach().T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("result", ["out=", "fresh"])
def test_mixup_peers_compute_what_ours_does(dtype, memory_format, result, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = domain_mixup("dry", 2, 16, dtype, memory_format, result)
    work = workloads.MixupWorkload(case, CPU)
    assert case.bytes == work.synthetic.nbytes + work.real.nbytes + work.out.nbytes
    ours = peers.find(MIXUP, "ours").build(work)()
    assert (ours is work.out) == (result == "out=")
    ours = ours.clone()
    assert ours.is_contiguous(memory_format=work.format)
    for name in ("eager torch", "torch.compile", "torch.compile, into out"):
        theirs = peers.find(MIXUP, name).build(work)()
        assert (theirs is work.out) == (name == "torch.compile, into out")
        assert theirs.is_contiguous(memory_format=work.format)
        tolerance = {"rtol": 2 * torch.finfo(theirs.dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_mixup_floors_copy_what_they_say():
    work = workloads.MixupWorkload(dry(MIXUP), CPU)
    shares = {"copy_ that moves as many bytes": 2, "copy_ that moves twice as many": 1}
    for name, share in shares.items():
        assert peers.find(MIXUP, name).build(work)().nbytes == dry(MIXUP).bytes // share


ENERGIES = [hypersphere_repulsion("dry", 64, 16, energy) for energy in ("row-max", "log-sum-exp")]


@pytest.mark.parametrize("case", ENERGIES, ids=lambda case: case.name)
def test_repulsion_peers_compute_what_ours_does(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    work = workloads.RepulsionWorkload(case, CPU)

    def run(name):
        work.clear_gradients()
        return peers.find(REPULSION, name).build(work)(), work.points.grad

    loss, gradient = run("ours")
    for name in ("eager torch", "torch.compile"):
        theirs, their_gradient = run(name)
        torch.testing.assert_close(theirs, loss)
        torch.testing.assert_close(their_gradient, gradient, rtol=1e-4, atol=1e-7)
    if work.row_max:
        torch.testing.assert_close(run("ours, neighbors")[0], loss)


@pytest.mark.parametrize(("name", "module"), [("FAISS", "faiss"), ("KeOps", "pykeops")])
def test_neighbor_searches_find_what_ours_does(name, module):
    pytest.importorskip(module)
    work = workloads.RepulsionWorkload(dry(REPULSION), CPU)
    theirs = peers.find(REPULSION, name).build(work)()
    torch.testing.assert_close(theirs, peers.find(REPULSION, "ours").build(work)())


def test_half_products_are_what_a_step_must_compute():
    for case in ENERGIES:
        work = workloads.RepulsionWorkload(case, CPU)
        peers.find(REPULSION, "half products").build(work)()
        made = {name: tuple(buffer.shape) for name, buffer in work.buffers.items()}
        n, d = case.shape["N"], case.shape["D"]
        gradients = {} if work.row_max else {"rows": (n // 2, d), "columns": (n, d)}
        assert made == {"cosines": (n // 2, n)} | gradients
        assert case.flops == 2 * (n // 2) * n * d * (1 if work.row_max else 3)
