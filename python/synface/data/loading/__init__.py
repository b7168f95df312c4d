"""Batches of images, decoded by worker processes and augmented."""
