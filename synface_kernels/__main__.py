"""`python -m synface_kernels`: what runs here, and why."""

from . import _env, margin_cross_entropy  # noqa: F401  (importing an op registers it)

print(_env.report())
