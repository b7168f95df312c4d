"""Random numbers are the same whether a test runs alone, after others, or once more."""

import random

import hypothesis
import numpy as np
import pytest
import torch


class TorchGenerator:
    """Seeded before each example, as Hypothesis does by itself with Python's and NumPy's."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH = TorchGenerator()  # Hypothesis itself refers to it weakly
hypothesis.register_random(TORCH)

# Others use the machine too: how long an example takes decides nothing.
UNHURRIED = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("tests", UNHURRIED, max_examples=150, derandomize=True)
hypothesis.settings.register_profile("fuzz", UNHURRIED, max_examples=5000, print_blob=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
