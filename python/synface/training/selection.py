"""The best verification of a run by one measure, and the end of a run that no longer improves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Selection:
    """The highest value of a measure so far, and how many verifications have followed it.

    Args:
        measure: the name of a metric, of which more is better; None selects nothing.
        patience: number of verifications without a higher value after which a run ends; 0: never.
        rows: verifications so far, with ``step`` and metrics.

    Attributes:
        best: the row of the highest value, the first of equal ones; None if there is none.
        since: number of verifications after it.

    Raises:
        ValueError: for a negative patience, one without a measure, and rows without the measure.
    """

    def __init__(
        self, measure: str | None, patience: int = 0, rows: Iterable[Mapping[str, float]] = ()
    ) -> None:
        if patience < 0 or (patience and measure is None):
            raise ValueError(
                f"patience must be 0 or more verifications, with a measure, got {patience} and "
                f"{measure!r}"
            )
        self.measure, self.patience = measure, patience
        self.best: Mapping[str, float] | None = None
        self.since = 0
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, float]) -> bool:
        """Add a verification, and return whether it is the best one so far."""
        if self.measure is None:
            return False
        if self.measure not in row:
            known = ", ".join(name for name in row if name not in ("step", "epoch", "threshold"))
            raise ValueError(
                f"best must name a measure of the verification ({known}), got {self.measure!r}"
            )
        better = self.best is None or row[self.measure] > self.best[self.measure]
        if better:
            self.best, self.since = row, 0
        else:
            self.since += 1
        return better

    @property
    def ended(self) -> bool:
        """Whether the patience is at its end."""
        return bool(self.patience) and self.since >= self.patience

    def summary(self) -> str | None:
        """Return a sentence on the best verification; None if nothing is selected."""
        if self.measure is None or self.best is None:
            return None
        found = f"{self.measure} was highest, {self.best[self.measure]:.4f}, after epoch "
        found += f"{self.best['epoch']:g}"
        return f"{found}, and not higher in {self.since} verifications" if self.ended else found
