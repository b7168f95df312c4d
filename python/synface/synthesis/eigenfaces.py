"""Face generator from the eigenfaces of scikit-image's crops."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..common.check import check_least, check_memory
from ..common.rng import normals
from ..data.embedded import FACES, STYLES, enlarge, lfw_crops, restyle, to_bytes
from .heads.exact import on_grid
from .interface import check_arguments, check_size

CONTROLS = {"placement": (0, 1, 2, 3), "light": (5, 6, 7, 8), "sensor": (4, 9)}
# Blur and noise grow from none at the lowest number; the others change nothing at 0.
NEUTRAL = torch.zeros(STYLES, dtype=torch.float32, device="cpu")
NEUTRAL[list(CONTROLS["sensor"])] = -8.0


class EigenfaceGenerator:
    """Face generator from the eigenfaces of scikit-image's 100 LFW crops; needs no file.

    With the eigenfaces v_k and the standard deviations s_k of the crops along them, k <= K =
    min(99, D), the face of a unit embedding e is mean + sum_k s_k * sqrt(D) * (Q e)_k * v_k. Q is
    (K, D) with orthonormal rows, and always the same. A random e gives coefficients of unit
    variance, so the faces vary as the crops do. Up to D = 99 the coefficients have the embeddings'
    cosines; past that Q is a random projection. Pixels weigh the leading eigenfaces most: they keep
    the order of the cosines on average, not for every pair.

    The ten numbers of a style, mapped by the normal distribution function, are the arguments of
    `synface.data.embedded.restyle`: rotation, zoom, shift, blur, light and noise.

    Its controls are placement, light and sensor (blur and noise): it has neither expression, pose
    nor background.

    Each image is bitwise independent of the others in its batch.

    Args:
        embedding_size: D, at least 2.
        size: height and width in pixels, at least 8.

    Raises:
        ValueError: for an argument out of range.
        DataError: if scikit-image's file is missing or not as expected.

    Memory: 5 KB * D.

    Source: Turk, Pentland, "Eigenfaces for Recognition", Journal of Cognitive Neuroscience 1991.
    """

    style_size = STYLES
    controls = CONTROLS
    neutral = NEUTRAL

    def __init__(self, embedding_size: int, size: int = 48) -> None:
        check_least("embedding_size", embedding_size, 2)
        check_size(size)
        self.embedding_size = embedding_size
        self.image_shape = (size, size, 1)
        self.description = {"kind": "eigenfaces", "embedding_size": embedding_size, "size": size}
        crops = torch.from_numpy(lfw_crops())
        self._mean = crops.mean(0)
        centered = (crops - self._mean).flatten(1)
        _, singular, eigenfaces = torch.linalg.svd(centered, full_matrices=False)
        rank = min(FACES - 1, embedding_size)
        deviations = singular[:rank, None] / math.sqrt(FACES - 1)
        gaussian = np.random.default_rng(0).standard_normal((embedding_size, rank))
        rotation, triangle = torch.linalg.qr(torch.from_numpy(gaussian))
        # Signs are free in both factorizations: fixed, so that any LAPACK gives the same faces.
        rotation = rotation * triangle.diagonal().sign()
        largest = eigenfaces.gather(1, eigenfaces.abs().argmax(1, keepdim=True))
        axes = (eigenfaces * largest.sign())[:rank] * deviations * math.sqrt(embedding_size)
        # Numbers on a grid have sums that are exact in float64, in any order.
        self._axes = on_grid(rotation @ axes, 22)

    @torch.no_grad()
    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        check_arguments(self, embedding, style, seed)
        count, side = len(seed), self.image_shape[0]
        check_memory(f"{count} faces of {side}x{side} pixels at once", count * side**2 * 12 * 4)
        faces = enlarge(self.faces(embedding), self.image_shape[0])
        noise = [normals(faces.shape[1:], torch.Generator().manual_seed(s)) for s in seed.tolist()]
        images = restyle(faces, torch.special.ndtr(style), torch.stack(noise))
        return to_bytes(images).permute(0, 2, 3, 1)

    def faces(self, embedding: Tensor) -> Tensor:
        """Return (B, 25, 25) float64 faces in [0, 1], without any style, of (B, D) unit rows."""
        offset = on_grid(embedding.double(), 22) @ self._axes
        return (self._mean + offset.unflatten(1, self._mean.shape)).clamp_(0.0, 1.0)
