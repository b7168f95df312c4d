"""`python -m synface_kernels`: what runs here, and why."""

from . import _env

print(_env.report())
