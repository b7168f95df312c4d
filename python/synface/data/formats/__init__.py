"""Readers and writers of image sets in common formats."""
