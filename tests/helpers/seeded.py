"""Random tensors and networks from a seed, without a change to torch's global generator."""

import torch


def random(*shape, seed=0, dtype=torch.float32):
    """Return standard normal draws."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(build, seed=0):
    """Return what ``build`` returns with a global generator of this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
