"""How good a network is on people held out, beside raw pixels."""

from __future__ import annotations

import torch

from ..data import Faces
from ..evaluation.embedding import embed, pixel_embeddings
from ..evaluation.metrics import Verification, verify
from .terminal import console


def verify_network(
    backbone: torch.nn.Module, held: Faces, batch_size: int = 256, flip: bool = True
) -> Verification:
    return verify(embed(backbone, held.images, batch_size, flip), held.labels)


def figures(found: Verification) -> dict[str, float]:
    numbers = {"auc": found.auc, "accuracy": found.accuracy}
    numbers |= {f"tar_at_far_{far:g}": tar for far, tar in found.tar.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def verify_pixels(held: Faces) -> Verification:
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
    mean_image = held.images.double().mean(0)
    centered = verify(pixel_embeddings(held.images, mean_image), held.labels)
    people = f"{len(held.identities)} people" + (" never trained on" if unseen else "")
    console.print(f"\nverification on {people} ({len(held)} images)", highlight=False)
    console.print(f"[bold]trained network[/bold]\n{trained.summary()}", highlight=False)
    console.print(f"[bold]raw pixels, centered cosine[/bold]\n{pixels.summary()}", highlight=False)
    console.print(
        f"ROC-AUC: trained [bold]{trained.auc:.4f}[/bold], raw pixels {pixels.auc:.4f} "
        f"({centered.auc:.4f} with these people's mean image taken off)\n",
        highlight=False,
    )
