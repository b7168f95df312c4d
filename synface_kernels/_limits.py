"""Bounds of arguments that several ops share, without torch."""

# Greatest factor of a cosine in an exponent: there one float32 ulp of the cosine changes the
# exponential by 6 %.
SHARPEST = 1e6
