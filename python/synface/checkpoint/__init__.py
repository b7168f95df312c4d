"""Checkpoints and the logs that go with them."""
