"""Readers and writers of image sets in common file formats."""
