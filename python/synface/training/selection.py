"""The best verification of a run by one measure, and the end of a run that no longer improves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

NO_MEASURES = ("step", "epoch", "threshold")  # of a verification's row


class Selection:
    """The highest value of a measure so far, and how many verifications have followed it.

    Args:
        measure: the name of a metric, of which more is better; None selects nothing.
        patience: number of verifications without a higher value after which a run ends; 0: never.

    Attributes:
        best: the row of the highest value, the first of equal ones; None if there is none.
        since: number of verifications after it.

    Raises:
        ValueError: for a negative patience, or one without a measure.
    """

    def __init__(self, measure: str | None, patience: int = 0) -> None:
        if patience < 0 or (patience and measure is None):
            raise ValueError(
                f"patience must be 0 or more verifications, with a measure, got {patience} and "
                f"{measure!r}"
            )
        self.measure, self.patience = measure, patience
        self.best: Mapping[str, float] | None = None
        self.since = 0

    def resume(self, rows: Iterable[Mapping[str, float]], kept: Iterable[int]) -> None:
        """Continue after a run's verifications.

        The best one is that of the newest checkpoint that was kept, whatever the rows say: they may
        have been judged by another measure, or their checkpoints lost.

        Args:
            rows: the verifications, with ``step`` and metrics. kept: steps of the best checkpoints.
        """
        newest = max(kept, default=None)
        for row in rows:
            if row["step"] == newest:
                self.add(row)
            elif self.best is not None:
                self.since += 1

    def add(self, row: Mapping[str, float]) -> bool:
        """Add a verification, and return whether it is the best one so far.

        Raises:
            ValueError: for a row without the measure.
        """
        if self.measure is None:
            return False
        known = [name for name in row if name not in NO_MEASURES]
        if self.measure not in known:
            raise ValueError(
                f"best must name a measure of the verification ({', '.join(known)}), got "
                f"{self.measure!r}"
            )
        value = row[self.measure]
        better = value == value and (self.best is None or value > self.best[self.measure])
        if better:
            self.best, self.since = row, 0
        else:
            self.since += 1
        return better

    @property
    def ended(self) -> bool:
        """Return whether ``patience`` verifications have followed without a higher value."""
        return bool(self.patience) and self.since >= self.patience

    def summary(self) -> str | None:
        """Return a sentence on the best verification; None if nothing is selected."""
        if self.measure is None or self.best is None:
            return None
        found = f"{self.measure} was highest, {self.best[self.measure]:.4f}, after epoch "
        found += f"{self.best['epoch']:g}"
        return f"{found}, and not higher in {self.since} verifications" if self.ended else found
