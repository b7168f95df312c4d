"""Durations as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration in round numbers: "40 s", "24 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    if seconds < 99.5 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
