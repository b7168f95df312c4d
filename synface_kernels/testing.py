"""How this library's tests judge an implementation: against float64, by what torch itself loses."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact_as_torch(
    actual: Tensor,
    exact: Tensor,
    torch_result: Tensor,
    *,
    atol: float | Tensor,
    name: str = "result",
) -> None:
    """Asserts |actual − exact| ≤ 2·max|torch_result − exact| + atol, elementwise.

    Args:
        actual: what the implementation gave; any floating dtype.
        exact: the float64 reference, of the same shape.
        torch_result: what plain torch gives in the implementation's dtype.
        atol: a small absolute term, in the result's unit: one, or each element's.
        name: what to call it in the message.

    Raises:
        AssertionError: with the worst element, its error and what was allowed. Non-finite elements
            must agree in kind and place.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    actual, torch_result = actual.detach().double().cpu(), torch_result.detach().double().cpu()
    exact = exact.detach().double().cpu()
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: non-finite elements differ"
    if not finite.any():
        return
    own = (torch_result - exact)[finite].abs().max()
    error = torch.where(finite, (actual - exact).abs(), 0)
    allowed = (2 * own + atol).expand_as(error)
    worst = (error - allowed).argmax()
    off, most = error.flatten()[worst], allowed.flatten()[worst]
    assert off <= most, (
        f"{name}: error {off:.3g} at flat index {worst} (got {actual.flatten()[worst]:.9g},"
        f" exact {exact.flatten()[worst]:.9g}); allowed {most:.3g}, torch's own {own:.3g}"
    )
