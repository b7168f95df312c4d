"""Imported by each Python process that a test starts, which else spends a seventh on garbage."""

import gc

gc.set_threshold(20_000, 10, 10)
