"""All kernels are launched by one function, on their tensors' device, in grids that GPUs take."""

import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import JITFunction

from synface_kernels.ops import _triton
from synface_kernels.ops.domain_mixup import kernel_triton as domain_mixup
from synface_kernels.ops.domain_mixup.reference import Operands
from synface_kernels.ops.margin_cross_entropy import config_triton
from synface_kernels.ops.margin_cross_entropy import launch_triton as margin_cross_entropy
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs
from synface_kernels.ops.row_update import kernel_triton as row_update
from synface_kernels.ops.row_update.reference import Update

OPS = Path(_triton.__file__).parent


def test_every_launch_goes_through_the_one_that_sets_the_device() -> None:
    launches = {
        f"{file.relative_to(OPS)}: {line.strip()}"
        for file in OPS.rglob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r"\w\[[^\]]*grid[^\]]*\]\(|\.(run|warmup)\(.*grid", line)
    }
    assert launches == {"_triton.py: kernel[grid](*args, **config)"}


def test_the_device_is_that_of_the_first_tensor() -> None:
    order: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **config: order.append((grid, *args, config))

    class Device:
        def __init__(self, tensor: Any) -> None:
            order.append(tensor)

        def __enter__(self) -> None:
            order.append("enter")

        def __exit__(self, *error: object) -> None:
            order.append("exit")

    first, second = torch.zeros(1), torch.zeros(2)
    with mock.patch.object(torch.cuda, "device_of", Device):
        _triton.launch(Kernel(), (3,), first, second, BLOCK=4)
    assert order[:2] == [first, "enter"]
    assert order[2] == ((3,), first, second, {"BLOCK": 4})
    assert order[3:] == ["exit"]


@pytest.mark.parametrize("grid", [(2**31,), (1, 65536), (1, 1, 65536)])
def test_a_grid_beyond_the_limits_is_an_error(grid: tuple[int, ...]) -> None:
    kernel = mock.MagicMock(__name__="_some_kernel")
    with pytest.raises(ValueError, match=r"_some_kernel would need a grid of .* split the batch"):
        _triton.launch(kernel, grid, torch.zeros(1))
    kernel.__getitem__.assert_not_called()


def grids(run: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return the grid and the options of every launch."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **config: Any) -> None:
        found.append((grid, config))

    with mock.patch.object(JITFunction, "run", record):
        run()
    return found


@pytest.mark.parametrize(
    ("shape", "wide"),
    [((2, 3, 112, 112), False), ((2, 1, 9000, 9000), False), ((2, 4, 32768, 32768), True)],
)
def test_images_of_any_size_are_mixed(shape: tuple[int, ...], wide: bool) -> None:
    """Also of more than 65,535 blocks, a grid's second axis, and of more than 2^31 elements."""
    images = torch.empty(shape, device="meta")
    psi = torch.empty(shape[0], dtype=torch.float64, device="meta")
    affine = torch.empty(shape[1], 2, dtype=torch.float64, device="meta")
    operands = Operands(images, images, psi, affine, None, None)
    launched = grids(lambda: domain_mixup.forward(operands, images))
    launched += grids(lambda: domain_mixup.backward(images, operands, images, images, psi))
    blocks = -(-images[0].numel() // domain_mixup.BLOCK)
    assert [grid for grid, _ in launched] == [(shape[0] * blocks,)] * 2
    assert [config["WIDE"] for _, config in launched] == [wide] * 2


def test_millions_of_rows_are_updated() -> None:
    rows, ids = torch.empty(10**7, 513, device="meta"), torch.empty(10**7, device="meta").long()
    update = Update(rows, rows, ids, ids, 7, 1)
    launched = grids(lambda: row_update.sgd(update, rows, 0.1, 0.9, 0.1, 0.0, False))
    launched += grids(lambda: row_update.adamw(update, rows, rows, 0.1, 0.9, 0.999, 1e-8, 0.1))
    assert [grid for grid, _ in launched] == [(10**7, 2)] * 2


@pytest.mark.parametrize("n", [1, 4])
def test_few_rows_meet_millions_of_classes(n: int) -> None:
    """A tile that fits the workspace has no more blocks than a grid's second axis."""
    empty = torch.empty
    weight = empty(20_000_000, 8, dtype=torch.bfloat16, device="meta")
    statistics = empty(n, dtype=torch.float64, device="meta")
    labels = empty(n, 1, dtype=torch.int64, device="meta")
    inputs = BackwardInputs(
        input=empty(n, 8, dtype=torch.bfloat16, device="meta"),
        weight=weight,
        class_ids=None,
        labels=labels,
        negative_lse=statistics,
        mean_center=statistics[:0],
        center_sum=statistics[:0],
        saved=empty(len(weight), device="meta"),
        grad_negative_lse=statistics,
        grad_target_cosine=labels.double(),
        grad_cosine_sum=statistics[:0],
        scale=64.0,
        limit=math.inf,
        needs_input_grad=True,
    )
    launched = grids(lambda: margin_cross_entropy.backward(inputs, True))
    blocks = [grid[1] for grid, config in launched if "PLAIN" in config and len(grid) > 1]
    assert 20_000_000 / 128 <= sum(blocks) <= 20_000_000 / 128 + len(blocks)


def test_a_later_step_chooses_no_tiles_anew() -> None:
    """The host would take milliseconds for each."""
    config_triton._quanta_in_whole_waves.cache_clear()
    config_triton.class_splits.cache_clear()
    chip = config_triton.Chip(90, 132)
    for _ in range(3):
        programs = config_triton.Programs(1, 128, 1, 128, 2)
        assert config_triton.tile_classes(10**6, 132, 128, programs, chip) % 128 == 0
        config_triton.class_splits(7813, 1, chip)
    for choice in (config_triton._quanta_in_whole_waves, config_triton.class_splits):
        assert choice.cache_info().misses == 1


def test_a_later_step_compiles_nothing_anew() -> None:
    """Arguments that change from step to step are not part of what a kernel is compiled for."""
    for kernel in (row_update._sgd_kernel, row_update._adamw_kernel):
        for parameter in kernel.params:
            if parameter.name in ("until", "key0", "key1", "key2", "terms"):
                assert parameter.do_not_specialize, parameter.name
