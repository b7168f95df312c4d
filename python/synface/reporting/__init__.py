"""Plots and pages of reports. This package imports nothing of ours."""
