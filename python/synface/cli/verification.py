"""Verification of held-out people by a network and by raw pixels, for the commands."""

from __future__ import annotations

import torch

from ..data import Faces
from ..evaluation.embedding import embed, pixel_embeddings
from ..evaluation.metrics import Verification, verify
from .terminal import console


def verify_network(
    backbone: torch.nn.Module, held: Faces, batch_size: int = 256, flip: bool = True
) -> Verification:
    """Return how well a network's embeddings verify people, computed on the network's device."""
    device = next((parameter.device for parameter in backbone.parameters()), held.images.device)
    embeddings = embed(backbone, held.images, batch_size, flip, device=device)
    return verify(embeddings, held.labels)


def figures(found: Verification) -> dict[str, float]:
    """Return the measured metrics of a verification, by name."""
    numbers = {"auc": found.auc, "accuracy": found.accuracy}
    numbers |= {f"tar_at_far_{far:g}": tar for far, tar in found.tar.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def verify_pixels(held: Faces) -> Verification:
    """Return how well raw pixels verify people.

    Raises:
        ValueError: for too few people or images.
    """
    try:
        return verify(pixel_embeddings(held.images), held.labels)
    except ValueError as error:
        raise ValueError(
            f"{len(held)} images of {len(held.identities)} people cannot be verified on "
            f"({error}): hold out more, or none (--holdout 0)"
        ) from error


def print_verification(
    trained: Verification, pixels: Verification, held: Faces, unseen: bool = True
) -> None:
    """Print how well a network and raw pixels verify people.

    Args:
        unseen: say that the network was not trained on these people.
    """
    mean_image = held.images.double().mean(0)
    centered = verify(pixel_embeddings(held.images, mean_image), held.labels)
    people = f"{len(held.identities)} people" + (" never trained on" if unseen else "")
    console.print(f"\nverification on {people} ({len(held)} images)", highlight=False)
    console.print(f"[bold]trained network[/bold]\n{trained.summary()}", highlight=False)
    console.print(f"[bold]raw pixels, centered cosine[/bold]\n{pixels.summary()}", highlight=False)
    console.print(
        f"ROC-AUC: trained [bold]{trained.auc:.4f}[/bold], raw pixels {pixels.auc:.4f} "
        f"({centered.auc:.4f} with these people's mean image subtracted)\n",
        highlight=False,
    )
