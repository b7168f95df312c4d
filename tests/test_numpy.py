"""The NumPy kernels check their arrays, and release the interpreter lock."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

import synface_kernels.numpy as skn

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 8)).astype(np.float32)
W = RNG.standard_normal((5, 8)).astype(np.float32)
LABELS = np.array([[0], [1], [4], [-1]])
LSE, _, COSINE, MEAN = skn.margin_cross_entropy_forward(X, W, LABELS, 16.0, True)
BACKWARD: dict[str, Any] = {
    "negative_lse": LSE,
    "mean_center": MEAN,
    "grad_negative_lse": np.ones(4),
    "grad_target_cosine": np.ones((4, 1)),
}


def test_labels_of_any_integer_type() -> None:
    for dtype in (np.int8, np.int16, np.int32, np.int64):
        got = skn.margin_cross_entropy_forward(X, W, LABELS.astype(dtype), 16.0, True)
        for ours, expected in zip(got, (LSE, _, COSINE, MEAN), strict=True):
            np.testing.assert_array_equal(ours, expected)
    unsigned = LABELS[:3].astype(np.uint8)
    got = skn.margin_cross_entropy_forward(X[:3], W, unsigned, np.float32(16.0))
    np.testing.assert_array_equal(got[2], COSINE[:3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": LABELS + 0.7}, ValueError, r"labels must be of an integer .* float64 \(4, 1\)"),
        ({"labels": [["3"]] * 4}, ValueError, "labels must be of an integer dtype"),
        ({"labels": LABELS == 1}, ValueError, "labels must be of an integer dtype.* bool"),
        ({"labels": LABELS.astype(np.uint64)}, ValueError, "labels must be .* got uint64"),
        ({"labels": LABELS[:3]}, ValueError, r"do not fit together: got \(4, 8\)"),
        ({"labels": LABELS[:, 0]}, ValueError, "do not fit together"),
        ({"labels": LABELS + 5}, IndexError, "labels must be in"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and positive, got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be finite and positive, got inf"),
        ({"scale": -1}, ValueError, "scale must be finite and positive, got -1"),
        ({"scale": 0.0}, ValueError, "scale must be finite and positive, got 0.0"),
        ({"scale": "64"}, TypeError, "scale must be a number, got str"),
        ({"scale": True}, TypeError, "scale must be a number, got bool"),
        ({"scale": 1e308}, ValueError, r"scale must be at most 1e\+06, got 1e\+308"),
        ({"scale": 10**400}, ValueError, r"scale must be at most 1e\+06, got 1000"),
        ({"labels": LABELS * 0 - 2}, ValueError, "labels must be in .*got -2"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": X, "weight": W, "labels": LABELS, "scale": 16.0} | change
    for function, more in (
        (skn.margin_cross_entropy_forward, {}),
        (skn.margin_cross_entropy_backward, BACKWARD),
    ):
        with pytest.raises(error, match=message):
            function(**arguments, **more)


@pytest.mark.parametrize(
    "change",
    [
        {"negative_lse": LSE[:3]},
        {"mean_center": MEAN.T},
        {"grad_negative_lse": np.ones(4, dtype=int)},
        {"grad_target_cosine": np.array([["1"]] * 4)},
    ],
)
def test_bad_gradients(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be floating point"):
        skn.margin_cross_entropy_backward(X, W, LABELS, **BACKWARD | change)


def test_other_threads_run_meanwhile() -> None:
    """Kernels take a tenth of a second; if they held the lock, the main thread could not tick."""
    x = RNG.standard_normal((512, 256)).astype(np.float32)
    w = RNG.standard_normal((20_000, 256)).astype(np.float32)
    labels = np.arange(512)[:, None]
    images = RNG.integers(0, 256, (128, 224, 224, 3), dtype=np.uint8)
    lse, _, _, mean = skn.margin_cross_entropy_forward(x, w, labels, 16.0, True)
    upstream = (lse, mean, np.ones(512), np.ones((512, 1)))
    for run in (
        lambda: skn.margin_cross_entropy_forward(x, w, labels, 16.0, True),
        lambda: skn.margin_cross_entropy_backward(x, w, labels, *upstream, 16.0),
        lambda: skn.domain_mixup(images, images, 0.3),
    ):
        began: list[float] = []
        thread = threading.Thread(target=lambda run=run, began=began: (began.append(0.0), run()))
        thread.start()
        while not began:
            time.sleep(0)
        ticks = 0
        while thread.is_alive():
            time.sleep(0.001)
            ticks += 1
        assert ticks > 5
