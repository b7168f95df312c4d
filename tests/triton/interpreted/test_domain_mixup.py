"""The Triton kernels of domain mixup, interpreted on CPU tensors: the definition's very bits.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import itertools

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.ops.domain_mixup import kernel_triton

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def images(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    return torch.rand(shape, generator=rng).to(dtype)


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 20, 19, 3), (3, 1, 9, 1), (2, 2, 2, 5)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    rng = torch.Generator().manual_seed(0)
    if layout == "NCHW":
        shape = (shape[0], shape[3], *shape[1:3])
    channels = shape[3 if layout == "NHWC" else 1]
    mean = [0.4 + 0.02 * c for c in range(channels)]
    std = [0.2 + 0.01 * c for c in range(channels)]
    for source, flipped, memory_format in itertools.product(
        (torch.uint8, F32, BF16), (False, True), (torch.contiguous_format, torch.channels_last)
    ):
        s, r = images(shape, source, rng), images(shape, source, rng)
        psi = torch.rand(shape[0], generator=rng)
        flip = torch.rand(2, shape[0], generator=rng) < 0.5 if flipped else None
        got, expected = (
            sk.domain_mixup(
                s, r, psi, mean=mean, std=std, flip=flip, layout=layout, dtype=dtype,
                memory_format=memory_format, impl=impl,
            )
            for impl in ("triton", "reference")
        )  # fmt: skip
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_backward(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    shape = (3, 11, 13, 3)
    flip = torch.tensor([[True, False, True], [False, False, True]])
    gradient = torch.randn(3, 3, 11, 13, generator=rng)
    inputs = [images(shape, dtype, rng), images(shape, dtype, rng), torch.rand(3, generator=rng)]
    results = []
    for impl in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        sk.domain_mixup(*leaves, flip=flip, impl=impl).backward(gradient)
        results.append([leaf.grad for leaf in leaves])
    for got, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-6, atol=0)


def test_images_too_large_for_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant for them, on small ones."""
    rng = torch.Generator().manual_seed(0)
    inputs = [images((2, 30, 40, 3), F32, rng) for _ in range(2)]
    psi = torch.rand(2, generator=rng)
    results = []
    for most in (2**31, 0):
        monkeypatch.setattr(kernel_triton, "MOST_ELEMENTS", most)
        leaves = [t.clone().requires_grad_() for t in (*inputs, psi)]
        mixed = sk.domain_mixup(*leaves, impl="triton")
        mixed.square().sum().backward()
        results.append([mixed, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *results))


def test_ties_round_once() -> None:
    """Values that float32 would round onto a tie of the narrower type."""
    for dtype, bits in ((BF16, 8), (F16, 11)):
        tie = 1 + 2.0**-bits
        s = torch.tensor([tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40], dtype=F64)
        s = s.view(1, 4, 1, 1)
        got, expected = (
            sk.domain_mixup(s, s, 1.0, mean=0.0, std=1.0, dtype=dtype, impl=impl)
            for impl in ("triton", "reference")
        )
        above = 1 + 2.0 ** (1 - bits)
        assert expected.flatten().tolist() == [above, 1.0, 1.0, -above]
        assert torch.equal(got, expected)


def test_empty() -> None:
    for b, h, w in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
        s = torch.zeros(b, h, w, 3, requires_grad=True)
        psi = torch.full((b,), 0.5, requires_grad=True)
        mixed = sk.domain_mixup(s, s, psi, impl="triton")
        assert mixed.shape == (b, 3, h, w)
        mixed.sum().backward()
        assert torch.equal(psi.grad, torch.zeros(b))


def test_second_derivatives() -> None:
    inputs = [torch.rand(2, 2, 3, 3, dtype=F64, requires_grad=True) for _ in range(2)]
    psi = torch.tensor([0.3, 0.6], dtype=F64, requires_grad=True)
    flip = torch.tensor([[True, False], [True, True]])

    def run(*given: Tensor) -> Tensor:
        return sk.domain_mixup(*given, flip=flip, dtype=F64, impl="triton")

    assert torch.autograd.gradgradcheck(run, (*inputs, psi), fast_mode=True)
