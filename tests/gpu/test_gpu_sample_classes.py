"""Class sampling on a GPU, against its definition on the CPU. Run by `make gpu-evidence`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from tests.gpu.on_device import (
    DEVICE,
    assert_no_host_sync,
    assert_same,
    compiled,
    needs_device,
    on_another_device,
    one_process_group,
    pick,
    replayed,
    rng,
)

pytestmark = needs_device
N, C = pick((512, 200_000), (16, 300))
# Few, half, nearly all and all of the classes; fewer than there are labels.
SIZES = [C // 10, C // 2, C - C // 20, C, 3]


def labels(k: int | None = None, ignored: bool = False, device: str = DEVICE) -> Tensor:
    shape = (N,) if k is None else (N, k)
    target = torch.randint(0, C, shape, generator=torch.Generator().manual_seed(1))
    if ignored:
        target[::3] = -100
    return target.to(device)


def draw(target: Tensor, size: int, impl: str = "torch", **options: Any) -> list[Tensor]:
    """Sample with a CPU generator, whose number is the same for every device."""
    generator = torch.Generator().manual_seed(7)
    return list(sk.sample_classes(target, C, size, generator, impl=impl, **options))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_definitions_classes(size, k, ignored):
    target = labels(k, ignored)
    got = draw(target, size)
    expected = draw(target.cpu(), size, "reference")
    assert_same([t.cpu() for t in got], expected)
    assert all(t.device.type == DEVICE for t in got)


@pytest.mark.parametrize("size", SIZES)
def test_two_runs_agree_bitwise(size):
    assert_same(draw(labels(), size), draw(labels(), size))


def test_classes_rise_and_include_the_labels():
    target = labels()
    ids, remapped = sk.sample_classes(target, C, C // 10, rng(3))
    assert ids.shape == (C // 10,)
    assert (ids[1:] > ids[:-1]).all()
    assert torch.equal(ids[remapped], target)


def test_a_replayed_draw_is_another_draw():
    target, generator = labels(), rng(3)
    replay = replayed(
        lambda: sk.sample_classes(target, C, C // 10, generator, impl="torch"),
        generators=[generator],
    )
    ids, remapped = replay
    assert (ids[1:] > ids[:-1]).all()
    assert torch.equal(ids[remapped], target)
    again, _ = sk.sample_classes(target, C, C // 10, rng(3), impl="torch")
    assert not torch.equal(ids, again)  # the generator has moved on


def test_a_draw_never_waits_for_the_gpu():
    target, generator = labels(), rng(3)
    assert_no_host_sync(lambda: sk.sample_classes(target, C, C // 10, generator, impl="torch"))


def test_another_device():
    on_another_device(lambda device: draw(labels(device=device), C // 10))


def test_compile_fullgraph():
    target = labels()

    def function(target: Tensor) -> tuple[Tensor, Tensor]:
        return sk.sample_classes(target, C, C // 10, impl="torch")

    ids, remapped = compiled(function)(target)
    assert ids.shape == (C // 10,)
    assert (ids[1:] > ids[:-1]).all()
    assert torch.equal(ids[remapped], target)


def test_a_group_of_one_process_is_no_group():
    target = labels()
    with one_process_group() as group:
        ids, same = draw(target, C // 10, group=group)
    assert torch.equal(same, target)
    assert torch.equal(ids, draw(target, C // 10)[0])
