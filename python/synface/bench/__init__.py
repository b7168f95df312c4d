"""Measurements and plans: speed, memory and scale on the machine at hand."""
