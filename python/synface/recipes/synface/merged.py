"""Generated and real images side by side: the control of domain mixup."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from ...data import Faces
from ...data.loading.loader import Timing
from ...data.loading.sampler import WHOLE, RankSlice
from ...synthesis.sources import GeneratedSource
from ...training.config import TrainConfig
from ...training.sources import Batch, FacesSource, fingerprint


class Merged:
    """Training data of generated images and as many real ones, unmixed.

    Each generated image is drawn once in an epoch, and the real ones are cycled to as many: both
    have half of the batches, as both have half of a mixed image on average.

    Args:
        generated: its images are generated when training starts, and kept in memory.
        real: the real images, whose classes follow the generated ones.
    """

    timing: Timing | None = None

    def __init__(self, generated: GeneratedSource, real: Faces) -> None:
        self.generated, self.real = generated, real
        self.image_shape = generated.image_shape
        self.num_classes = generated.num_classes + len(real.identities)

    def __len__(self) -> int:
        return 2 * len(self.generated)

    def description(self) -> dict[str, Any]:
        """Return what identifies the data, as `Source.description` does."""
        found = self.generated.description()
        return found | {
            "source": f"{found['source']}, merged with {self.real.source}",
            "fingerprint": f"{found['fingerprint']} {fingerprint(self.real)}",
            "identities": self.num_classes,
        }

    def batches(
        self,
        config: TrainConfig,
        first: int,
        part: RankSlice = WHOLE,
        device: torch.device | str = "cpu",
    ) -> Generator[tuple[int, Batch]]:
        """Yield batches as `Source.batches` does."""
        yield from FacesSource(self._faces()).batches(config, first, part, device)

    def _faces(self) -> Faces:
        """Return the generated images and as many real ones, cycled, with later labels."""
        made, real = self.generated.faces(), self.real
        cycled = torch.arange(len(made), device="cpu") % len(real)
        return Faces(
            torch.cat([made.images, real.images[cycled]]),
            torch.cat([made.labels, real.labels[cycled] + len(made.identities)]),
            [*made.identities, *real.identities],
            f"{made.source} and {real.source}",
        )
