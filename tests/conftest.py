"""Seeds, threads and the choice of cases, for all tests.

A test's random numbers do not depend on the tests before it.
"""

import gc
import os
import random
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.pairwise import pairwise

try:  # the tests on GPUs run without it
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None


class TorchGenerator:
    """torch's generator, seeded before each example, as Hypothesis seeds NumPy's."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH = TorchGenerator()  # Hypothesis itself refers to it weakly
if hypothesis is not None:
    hypothesis.register_random(TORCH)
    # Others use the machine too: how long an example takes decides nothing.
    unhurried = hypothesis.settings(
        deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    profile = hypothesis.settings.register_profile
    profile("tests", unhurried, max_examples=150, derandomize=True)
    profile("fuzz", unhurried, max_examples=5000, print_blob=True)
    hypothesis.settings.load_profile("tests")

# Without it torch only warns of an op that returns a tensor twice.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"


@pytest.fixture(scope="module", autouse=True)
def _few_collections() -> None:
    """Keep what earlier files left, such as torch's compiler, out of the search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def blank_figures() -> Iterator[None]:
    """Save figures as empty files, in a test that does not look at them."""
    from tests.helpers.figures import blank  # matplotlib takes a while, and few tests need it

    with blank():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="Run each test function once, on its first parameters, and no slow one.",
    )
    parser.addoption(
        "--pairs",
        choices=["none", "marked", "all"],
        default="marked",
        help="Tests that run only cases with each pair of their parameters' values.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run slow tests first, or the last would run alone; deselect those that options omit."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    of_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen: set[pytest.Item] = set()
    pairs = config.getoption("--pairs")
    for cases in of_function.values():
        if config.getoption("--quick"):
            chosen.update([case for case in cases if not case.get_closest_marker("slow")][:1])
        elif pairs == "all" or (pairs == "marked" and cases[0].get_closest_marker("pairwise")):
            chosen.update(pairwise(cases))
        else:
            chosen.update(cases)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def pytest_configure(config: pytest.Config) -> None:
    """Divide the cores' threads among the processes of pytest-xdist, and those that they start.

    Waiting threads sleep: spinning, they would keep the other processes' from the cores.
    All collect garbage as tests/helpers/start says.
    """
    start = Path(__file__).parent / "helpers" / "start"
    paths = [str(start), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    runpy.run_path(str(start / "sitecustomize.py"))
    processes = getattr(config.option, "numprocesses", None)
    if processes:  # the processes inherit both
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))


THREADS = torch.get_num_threads()
# Those whose kernels run on several threads, where races would show.
THREADED = {"heads", "ops", "optim", "test_numpy.py", "test_opcheck.py", "test_result_memory.py"}


@pytest.hookimpl(tryfirst=True)  # before the fixtures, whatever their scope
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give a test this process's share of threads, and those of kernels two at least."""
    part = item.path.relative_to(Path(__file__).parent).parts[0]
    torch.set_num_threads(max(2, THREADS) if part in THREADED else THREADS)
