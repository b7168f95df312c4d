"""Backbones: networks that embed a face. This package imports nothing of ours."""
