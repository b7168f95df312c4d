"""Small centers of `synface.optim.centers`, trained on seeded batches."""

import torch
from synface.optim.centers import CentersConfig

SMALL = CentersConfig(200, 8, seed=3)


def batch(step, config=SMALL, size=16):
    """Return a step's embeddings and labels."""
    draw = torch.Generator().manual_seed(step)
    embeddings = torch.randn(size, config.embedding_size, generator=draw)
    return embeddings, torch.randint(config.num_classes, (size,), generator=draw)


def train(centers, until, num_sampled=40, lr=0.05):
    """Train up to a step."""
    while centers.step < until:
        embeddings, labels = batch(centers.step, centers.config)
        centers.loss(embeddings, labels, num_sampled=num_sampled).backward()
        centers.update(lr)


def snapshot(centers):
    """Return copies of the centers, their last steps and states by name."""
    tensors = {"weight": centers.weight, "last_step": centers.last_step, **centers.states}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(left, right):
    """Assert that two snapshots are the same bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name
