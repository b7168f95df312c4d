"""Bounds of arguments that several ops have, without torch."""

# Of what stands before a cosine in an exponential: a float32 cosine's last bit is then a factor of
# 1.06 of it.
SHARPEST = 1e6
