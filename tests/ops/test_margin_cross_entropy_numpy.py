"""The NumPy binding of the margin softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import synface_kernels.numpy
from tests.helpers.margin import ISAS, problem


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_numpy_binding_agrees(isa, dtype, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    assert synface_kernels.numpy.cpu_isa() == isa.replace("onednn", "avx512")  # has no oneDNN
    x, w, target, _, upstream = problem(9, 1100, 24, 2, torch.float32)
    x, w, g = x.numpy().astype(dtype), w.numpy().astype(dtype), upstream.numpy()
    target[:, 1] = (target[:, 0] + 1) % 1100
    target[4] = -1
    op = torch.ops.synface_kernels
    as_torch = [torch.from_numpy(v) for v in (x, w)]
    lse, most, cosine, _, _, *saved = op.margin_cross_entropy_forward(
        *as_torch, None, target, 64.0, math.inf, True, False, 0, False, "cpu"
    )
    mean = saved[0]
    actual = synface_kernels.numpy.margin_cross_entropy_forward(x, w, target.numpy(), 64.0, True)
    gc = np.stack([g, -g], 1)
    grads = op.margin_cross_entropy_backward(
        *as_torch,
        None,
        target,
        lse,
        *saved,
        *map(torch.from_numpy, (g, gc)),
        lse[:0],
        64.0,
        math.inf,
        True,
        True,
        False,
        "cpu",
    )
    expected = (lse, most, cosine, mean, *grads)
    actual += synface_kernels.numpy.margin_cross_entropy_backward(
        x, w, target.numpy(), actual[0], actual[3], g, gc, 64.0
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.numpy().dtype
        np.testing.assert_allclose(
            a, e.numpy(), rtol=1e-4 if dtype == np.float32 else 1e-10, atol=1e-5
        )


def test_numpy_bad_input():
    x, w = np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32)
    labels = np.array([[0], [1], [5]])
    for wrong in (5, 2**63 - 1):
        labels[2] = wrong
        with pytest.raises(IndexError, match=rf"labels must be in \[-1, 5\), got {wrong} in row 2"):
            synface_kernels.numpy.margin_cross_entropy_forward(x, w, labels)
    with pytest.raises(
        ValueError, match="both be float32 or both float64, got float32 and float64"
    ):
        synface_kernels.numpy.margin_cross_entropy_forward(x, w.astype(float), labels)
    with pytest.raises(ValueError, match="do not fit together"):
        synface_kernels.numpy.margin_cross_entropy_forward(x, w[:, :3], labels)
