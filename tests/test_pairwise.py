"""The cases of a test marked `pairwise` have every pair of two parameters' values."""

from itertools import combinations, product
from types import SimpleNamespace

from tests.helpers.pairwise import pairwise


def pairs(cases):
    found = set()
    for case in cases:
        found |= set(combinations(case.callspec.params.items(), 2))
    return found


def test_every_pair_is_there_with_fewer_cases():
    values = {"a": range(4), "b": range(10, 13), "c": range(20, 22), "d": range(30, 33)}
    cases = [
        SimpleNamespace(callspec=SimpleNamespace(params=dict(zip(values, each, strict=True))))
        for each in product(*values.values())
    ]
    chosen = pairwise(cases)
    assert pairs(chosen) == pairs(cases)
    assert len(chosen) < len(cases) / 4
    assert chosen == pairwise(cases) == sorted(chosen, key=cases.index)
    without = [case for case in cases if case.callspec.params["a"] != 3]
    assert pairs(pairwise(without)) == pairs(without)


def test_nothing_is_left_out_of_a_test_with_two_parameters_or_none():
    cases = [
        SimpleNamespace(callspec=SimpleNamespace(params={"a": a, "b": b}))
        for a in range(3)
        for b in range(5)
    ]
    assert pairwise(cases) == cases
    alone = [SimpleNamespace()]
    assert pairwise(alone) == alone
