"""Fewer cases of a test with many parameters, with each pair of values among them."""

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(cases: Sequence[Any]) -> list[Any]:
    """Return cases that together have every pair of two parameters' values that any case has.

    Most faults need one value or two; those that need three are left to `--pairs none`.

    Args:
        cases: pytest's items of one test function.
    """
    left: list[tuple[Any, set]] = []
    for case in cases:
        params = case.callspec.params if hasattr(case, "callspec") else {}
        values = [(name, id(value)) for name, value in params.items()]
        left.append((case, set(itertools.combinations(values, min(2, len(values))))))
    missing = set().union(*(pairs for _, pairs in left))
    chosen = []
    while missing:  # greedily, the first of equals: the same cases in every process
        best = max(left, key=lambda each: len(each[1] & missing))
        left.remove(best)
        chosen.append(best[0])
        missing -= best[1]
    return [case for case in cases if case in chosen]
