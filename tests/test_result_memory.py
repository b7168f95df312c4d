"""The caching allocator of large CPU results: reuse, bounds, and ordinary tensors."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import synface_kernels as sk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="results are torch's elsewhere")

OPS = torch.ops.synface_kernels
MIB = 2**20


def result(mib: float) -> Tensor:
    return OPS._empty_result([int(mib * MIB)], torch.uint8, False)


@pytest.fixture(autouse=True)
def emptied(monkeypatch):
    monkeypatch.delenv("SYNFACE_CACHE_MIB", raising=False)
    sk.empty_cache()
    yield
    sk.empty_cache()


def test_a_result_reuses_the_memory_of_a_freed_one():
    rng = torch.Generator().manual_seed(0)
    s, r = (torch.randint(0, 256, (64, 64, 64, 3), generator=rng, dtype=torch.uint8) for _ in "sr")
    first = sk.domain_mixup(s, r, 0.3)
    expected, where = first.clone(), first.data_ptr()
    second = sk.domain_mixup(s, r, 0.6)
    assert second.data_ptr() != where  # the first is in use
    assert torch.equal(first, expected)
    assert OPS._cached_bytes() == 0
    view = first[1:]
    del first
    assert OPS._cached_bytes() == 0  # the view holds the memory
    assert torch.equal(view, expected[1:])
    del view
    assert OPS._cached_bytes() >= expected.nbytes
    third = sk.domain_mixup(s, r, 0.3)
    assert third.data_ptr() == where
    assert OPS._cached_bytes() == 0
    assert torch.equal(third, expected)


def test_gradients_are_results_too():
    rng = torch.Generator().manual_seed(0)
    s, r = (torch.rand(8, 3, 256, 256, generator=rng).requires_grad_() for _ in "sr")
    mixed = sk.domain_mixup(s, r, 0.3, layout="NCHW")
    where = mixed.untyped_storage().data_ptr()
    mixed.sum().backward()
    pointers = {x.grad.data_ptr() for x in (s, r)}
    assert len(pointers) == 2
    s.grad = r.grad = None
    del mixed
    sk.domain_mixup(s, r, 0.3, layout="NCHW").sum().backward()
    assert {x.grad.data_ptr() for x in (s, r)} <= pointers | {where}


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: sk.margin_cross_entropy(x[:8].detach(), x, torch.arange(8)),
        lambda x: sk.hypersphere_repulsion(x, energy=sk.MaxCosine()),
    ],
)
def test_gradients_reuse_the_memory_of_freed_ones(loss):
    x = torch.randn(3000, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pointers = []
    for _ in range(2):
        loss(x).backward()
        pointers.append(x.grad.data_ptr())
        x.grad = None
    assert pointers[0] == pointers[1]
    assert OPS._cached_bytes() == 4 * MIB  # 2.9 MiB, in whole huge pages


def test_too_large_a_block_is_not_taken():
    del_me = result(20)
    where = del_me.data_ptr()
    del del_me
    assert result(4).data_ptr() != where  # five times what is asked for
    assert result(12).data_ptr() == where
    assert result(22).data_ptr() != where


def test_small_results_are_torchs():
    small = result(1)
    small.zero_()
    del small
    assert OPS._cached_bytes() == 0


def test_the_cache_is_bounded_and_holds_the_newest(monkeypatch):
    monkeypatch.setenv("SYNFACE_CACHE_MIB", "16")
    blocks = [result(6) for _ in range(4)]
    pointers = [block.data_ptr() for block in blocks]
    while blocks:
        blocks.pop(0)
        assert OPS._cached_bytes() <= 16 * MIB
    assert OPS._cached_bytes() == 12 * MIB
    taken = [result(6) for _ in range(2)]
    assert {each.data_ptr() for each in taken} == set(pointers[2:])
    taken.clear()
    large = result(32)
    del large
    assert OPS._cached_bytes() == 12 * MIB  # larger than the bound: not cached
    monkeypatch.setenv("SYNFACE_CACHE_MIB", "8")
    held = result(2)  # takes no block of 6
    assert OPS._cached_bytes() <= 8 * MIB
    monkeypatch.setenv("SYNFACE_CACHE_MIB", "0")
    del held
    last = result(4)
    del last
    assert OPS._cached_bytes() == 0


def test_the_last_large_block_is_kept_whatever_its_size(monkeypatch):
    first, second, small = result(600), result(700), result(4)
    second[: 2 * MIB] = 7
    where = second.data_ptr()
    del first, small
    assert OPS._cached_bytes() == 604 * MIB
    del second  # displaces the first
    assert OPS._cached_bytes() == 704 * MIB
    assert result(300).data_ptr() != where  # less than half
    again = result(650)
    assert again.data_ptr() == where
    again[: 2 * MIB] = 5
    assert bool((again[: 2 * MIB] == 5).all())
    assert OPS._cached_bytes() == 304 * MIB  # 300 and 4
    del again
    monkeypatch.setenv("SYNFACE_CACHE_MIB", "600")  # a bound on all
    held = result(4)
    assert OPS._cached_bytes() == 300 * MIB
    large = result(601)
    del large
    assert OPS._cached_bytes() == 300 * MIB
    del held
    monkeypatch.delenv("SYNFACE_CACHE_MIB")
    del_me = result(513)
    del del_me
    sk.empty_cache()
    assert OPS._cached_bytes() == 0


def test_more_blocks_than_there_are_slots():
    blocks = [result(2) for _ in range(40)]
    blocks.clear()
    assert OPS._cached_bytes() == 32 * MIB  # 16 slots
    taken = [result(2) for _ in range(40)]
    assert OPS._cached_bytes() == 0
    assert len({block.data_ptr() for block in taken}) == 40


@pytest.mark.parametrize("value", ["-1", "many", "1.5", "512 ", "99999999999999999999"])
def test_a_bad_bound(monkeypatch, value):
    monkeypatch.setenv("SYNFACE_CACHE_MIB", value)
    with pytest.raises(ValueError, match="SYNFACE_CACHE_MIB must be a whole number of MiB"):
        result(4)


def test_empty_cache_gives_memory_back():
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    block = result(64)
    block.zero_()
    del block
    before = resident()
    sk.empty_cache()
    assert OPS._cached_bytes() == 0
    assert before - resident() > 56 * MIB


def test_threads_share_without_sharing():
    def work(seed: int) -> int:
        wrong = 0
        for step in range(20):
            block = result(2 + (seed + step) % 5)
            value = (seed * 20 + step) % 251
            block.fill_(value)
            wrong += int(bool((block != value).any()))
            del block
        return wrong

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 0
    finally:
        torch.set_num_threads(threads)
    assert 0 < OPS._cached_bytes() <= 512 * MIB
    sk.empty_cache()
    assert OPS._cached_bytes() == 0


def test_it_is_a_tensor_like_any_other():
    block = result(4).view(torch.float32)
    block.copy_(torch.arange(block.numel()))
    expected = block.clone()
    array = block.numpy()
    block.share_memory_()
    assert block.is_shared()
    assert torch.equal(block, expected)
    assert array[5] == 5  # NumPy's view keeps the memory alive
    grown = OPS._empty_result([MIB], torch.float32, False).fill_(3)
    grown.resize_(2 * MIB)
    assert (grown[:MIB] == 3).all()
    grown.untyped_storage().resize_(0)
    grown.untyped_storage().resize_(16 * MIB)
    grown.resize_(4).fill_(1)
    assert grown.tolist() == [1] * 4


SCRIPT = """
import os, sys, threading, torch
import synface_kernels as sk
ops = torch.ops.synface_kernels
make = lambda: ops._empty_result([4 << 20], torch.uint8, False)
first, second = make(), make()
first.fill_(7)
del second
assert ops._cached_bytes() == 4 << 20
child = os.fork()
if child == 0:
    ok = ops._cached_bytes() == 4 << 20
    block = make()  # the cached one, in this process's own copy
    block.fill_(9)
    ok = ok and bool((first == 7).all())
    del block, first
    sk.empty_cache()
    os._exit(0 if ok and ops._cached_bytes() == 0 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert ops._cached_bytes() == 4 << 20
block = make()
assert bool((first == 7).all())
sys.outlives = [block, first]  # freed when all modules are gone, or never
threading.Thread(target=lambda held: None, args=(make(),)).start()
"""


def test_forks_and_tensors_that_outlive_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
