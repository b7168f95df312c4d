"""Statistics of reports: intervals and tests against SciPy and by hand, their text and plots."""

from dataclasses import dataclass

import pytest
from scipy import stats
from synface.recipes.report import (
    difference,
    far_from_trained,
    plot_differences,
    plot_seeds,
    shown,
    shown_difference,
    slope,
    spread,
    verdict,
    write_report,
)
from synface.reporting.plots import figure


@dataclass
class Config:
    """No settings."""


A, B = [0.91, 0.93, 0.95, 0.90], [0.90, 0.89, 0.93, 0.91]


def test_an_interval_by_hand_and_by_scipy():
    found = spread([1.0, 2.0, 3.0])
    assert (found["mean"], found["std"], found["values"]) == (2.0, 1.0, [1.0, 2.0, 3.0])
    assert found["ci95"] == pytest.approx(4.302653 / 3**0.5)  # t of two degrees of freedom
    low, high = stats.ttest_1samp(A, 0.0).confidence_interval(0.95)
    found = spread(A)
    assert found["mean"] - found["ci95"] == pytest.approx(low)
    assert found["mean"] + found["ci95"] == pytest.approx(high)


def test_a_paired_difference_is_that_of_scipy():
    found, test = difference(spread(A), spread(B)), stats.ttest_rel(A, B)
    assert found["p"] == pytest.approx(test.pvalue)
    low, high = test.confidence_interval(0.95)
    assert found["mean"] - found["ci95"] == pytest.approx(low)
    assert found["mean"] + found["ci95"] == pytest.approx(high)
    assert found["values"] == [a - b for a, b in zip(A, B, strict=True)]
    with pytest.raises(ValueError, match="argument"):
        difference(spread(A), spread(B[:3]))


def test_a_slope_is_that_of_scipy_for_each_seed():
    rows, at = [A, B, [0.95, 0.97, 0.96, 0.99]], [4.0, 5.0, 7.0]
    found = slope([spread(row) for row in rows], at)
    each = [stats.linregress(at, [row[i] for row in rows]).slope for i in range(4)]
    assert found["values"] == pytest.approx(each)
    assert found["p"] == pytest.approx(stats.ttest_1samp(each, 0.0).pvalue)


def test_one_seed_and_equal_differences():
    one = difference(spread([0.5]), spread([0.4]))
    assert (one["std"], one["ci95"], one["p"]) == (None, None, None)
    none = difference(spread(A), spread(A))
    assert (none["ci95"], none["p"], verdict(none)) == (0.0, None, "not resolved")
    same = difference(spread([2.0, 3.0]), spread([1.0, 2.0]))
    assert (same["ci95"], same["p"], verdict(same)) == (0.0, 0.0, "higher")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.1, 0.11, 0.12], "higher"),
        ([-0.1, -0.11, -0.12], "lower"),
        ([0.1, -0.11, 0.12], "not resolved"),
        ([0.1], "one seed: no interval"),
    ],
)
def test_a_conclusion_is_worded_by_its_interval(values, text):
    assert verdict(difference(spread(values), spread([0.0] * len(values)))) == text


def test_rows_far_from_trained_are_named():
    top1 = {"good": [0.9, 1.0], "half": [0.4, 0.6], "mixed": [0.3, 0.6], "one seed": [0.1]}
    rows = {name: {"top1": spread(values)} for name, values in top1.items()}
    text = far_from_trained(rows)
    assert "below 0.5" in text
    assert text.endswith(": mixed; one seed.")
    del rows["mixed"], rows["one seed"]
    assert far_from_trained(rows) == ""


def test_text_of_numbers():
    assert shown(None) == "not measured"
    assert shown(0.5, 2) == "0.50"
    assert shown(spread([0.5])) == "0.5000"
    assert shown(spread([1.0, 2.0, 3.0]), 2) == "2.00 ± 2.48"
    zero = spread([0.0] * 3)
    assert shown_difference(difference(spread([0.02, 0.03, 0.01]), zero), 3) == (
        "+0.020 ± 0.025, p = 0.074"
    )
    assert shown_difference(difference(spread([-1.0, -1.0, -1.0]), zero), 1) == (
        "-1.0 ± 0.0, p < 0.001"
    )
    assert shown_difference(difference(spread([0.02]), spread([0.01])), 2) == "+0.01"


def test_plots_have_error_bars():
    _, axes = figure(6, 3, 1, 3)
    spreads = {"a": spread(A), "b": spread(B)}
    plot_seeds(axes[0], spreads, 0.9, "AUC")
    assert len(axes[0].containers) == 2
    gain = difference(spread(A), spread(B))
    plot_differences(axes[1], {"b": gain}, "gain")
    (bars,) = axes[1].containers[0].lines[2]
    ends = bars.get_segments()[0][:, 0]
    assert ends == pytest.approx([gain["mean"] - gain["ci95"], gain["mean"] + gain["ci95"]])
    assert axes[1].get_xlabel() == "gain"
    plot_differences(axes[2], {"b": difference(spread([0.5]), spread([0.4]))}, "one seed")
    plot_seeds(axes[2], {"b": spread([0.5])}, 0.9, "one seed")


@pytest.mark.parametrize("option", ["", " --quick"])
def test_a_report_of_the_quick_size_says_so(tmp_path, option):
    template = tmp_path / "some.md"
    template.write_text("By `{command}`. {quick}\n")
    page = write_report(
        tmp_path / "report", template, {}, {}, Config(), command=f"synface x{option}"
    )
    assert ("too few seeds and steps" in page.read_text()) == bool(option)
