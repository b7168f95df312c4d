"""`python -m synface_kernels`: print what runs here, and why."""

from . import _env

print(_env.report())
