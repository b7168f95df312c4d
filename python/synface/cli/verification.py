"""Verification of held-out people by a network and by raw pixels, for the commands."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import Faces
from ..evaluation.embedding import embed, pixel_embeddings
from ..evaluation.metrics import Verification, verify
from ..evaluation.report import SetResult
from ..evaluation.scores import scores_of_all
from .terminal import console, say


class Verifier:
    """Verifies a network on held-out people, and keeps the last result.

    Args:
        held: the people, of whom raw pixels are verified at once, for comparison.
        batch_size, flip: as for `embed`.

    Attributes:
        pixels: the result of raw pixels.
        last, embeddings: the network's last result, and its (N, D) float32 unit rows; None before
            the first one.

    Raises:
        ValueError: for too few people or images.
    """

    def __init__(self, held: Faces, batch_size: int = 256, flip: bool = True) -> None:
        self.held, self.batch_size, self.flip = held, batch_size, flip
        self.pixels = self._pixels()
        self.last: SetResult | None = None
        self.embeddings: torch.Tensor | None = None

    def _pixels(self) -> SetResult:
        held, began = self.held, time.perf_counter()
        try:
            found = verify(pixel_embeddings(held.images), held.labels)
        except ValueError as error:
            raise ValueError(
                f"{len(held)} images of {len(held.identities)} people cannot be verified on "
                f"({error}): hold out more, or none (--holdout 0)"
            ) from error
        return self._result("raw pixels", found, began)

    def _result(self, name: str, found: Verification, began: float) -> SetResult:
        seconds = time.perf_counter() - began
        return SetResult(name, self.held.source, len(self.held), seconds, found, None)

    def __call__(self, network: torch.nn.Module) -> SetResult:
        """Return how well a network verifies the people, computed on the network's device."""
        held, began = self.held, time.perf_counter()
        device = next((each.device for each in network.parameters()), held.images.device)
        rows = embed(network, held.images, self.batch_size, self.flip, device=device)
        self.embeddings = rows
        self.last = self._result("trained network", verify(rows, held.labels), began)
        return self.last

    def figures(self, network: torch.nn.Module) -> dict[str, float]:
        """Verify a network, print a line, and return the metrics by name."""
        found = self(network).verification
        say(
            f"verified: ROC-AUC {found.auc:.4f} (raw pixels {self.pixels.verification.auc:.4f}), "
            f"accuracy {found.accuracy:.4f}"
        )
        return figures(found)

    def print(self, trained: SetResult, unseen: bool = True) -> None:
        """Print how well a network and raw pixels verify the people.

        Args:
            unseen: say that the network was not trained on these people.
        """
        held = self.held
        mean_image = held.images.double().mean(0)
        centered = verify(pixel_embeddings(held.images, mean_image), held.labels)
        people = f"{len(held.identities)} people" + (" never trained on" if unseen else "")
        console.print(f"\nverification on {people} ({len(held)} images)", highlight=False)
        for result in (trained, self.pixels):
            name = result.name + (", centered cosine" if result is self.pixels else "")
            summary = result.verification.summary()
            console.print(f"[bold]{name}[/bold]\n{summary}", highlight=False)
        ours, pixels = trained.verification.auc, self.pixels.verification.auc
        console.print(
            f"ROC-AUC: trained [bold]{ours:.4f}[/bold], raw pixels {pixels:.4f} "
            f"({centered.auc:.4f} with these people's mean image subtracted)\n",
            highlight=False,
        )
        if warning := self.warning(trained):
            console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)

    def warning(self, trained: SetResult) -> str | None:
        """Return a sentence where a network verifies people worse than raw pixels do."""
        ours, pixels = trained.verification.auc, self.pixels.verification.auc
        if ours >= pixels:
            return None
        return (
            f"the network verifies these people worse than raw pixels do (ROC-AUC {ours:.4f} "
            f"against {pixels:.4f}): it has learned nothing that helps here; train on more people "
            "or for longer, or look at the loss"
        )

    def report(self, folder: Path, about: dict[str, Any], **options: Any) -> Path:
        """Write a report on the last network and raw pixels, and return its page's path.

        Args:
            about, options: as for `synface.evaluation.report.write`.
        """
        from ..evaluation import report

        assert self.last is not None
        assert self.embeddings is not None
        scores = scores_of_all(self.embeddings, self.held.labels, self.held.store)
        trained = replace(self.last, scores=scores)
        if warning := self.warning(trained):
            about = about | {"warning": warning}
        height, width, channels = self.held.images.shape[1:]
        options |= {"image_shape": (height, width, channels)}
        return report.write(folder, [trained, self.pixels], about, **options)


def figures(found: Verification) -> dict[str, float]:
    """Return the measured metrics of a verification, by name."""
    numbers = {"auc": found.auc, "accuracy": found.accuracy, "threshold": found.threshold}
    numbers |= {f"tar_at_far_{far:g}": tar for far, tar in found.tar.items()}
    return {name: number for name, number in numbers.items() if number is not None}
