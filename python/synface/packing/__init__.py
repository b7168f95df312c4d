"""Packing unit vectors on the hypersphere."""
