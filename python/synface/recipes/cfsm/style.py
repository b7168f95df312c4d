"""Stage 1 of CFSM: a generator and its style subspace for each target domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.check import check_device
from ...common.modes import evaluating
from ...common.rng import generator as draws
from ...common.rng import normals, seeded, seeds, standard_defaults
from ...data import normalize
from ..loop import descend, run_steps, set_cosine_lr
from .config import CfsmConfig
from .degrade import degrade
from .faces import People
from .model import (
    ORTHOGONALITY,
    Discriminator,
    Generator,
    identity_loss,
    lsgan_loss,
    orthogonality_loss,
    subspace_similarity,
)


def learn_style(
    config: CfsmConfig,
    people: People,
    recognizer: nn.Module,
    domain: str,
    folder: Path,
    **options: Any,
) -> tuple[Generator, list[dict[str, float]]]:
    """Train the generator of one domain; return it in evaluation mode, with its log.

    As in the authors' code, steps alternate: one draws o ~ N(0, I) for L_adv and L_id, the next
    sets o = 0 and compares the image itself with its redrawing (the anchor). Every domain starts
    from the same parameters, so that their subspaces can be compared.

    Args:
        recognizer: f, whose parameters and mode are not changed.
        options: see `run_steps`.
    """
    stage, device = config.style, check_device(config.device)
    with seeded(seeds(config.seed, "style parameters", 0)), standard_defaults():
        generator = Generator(config.generator, people.channels).to(device)
        discriminator = Discriminator(config.discriminator, people.channels).to(device)
    networks = {"generator": generator, "discriminator": discriminator}
    optimizers = {
        name: torch.optim.Adam(module.parameters(), stage.lr, (0.5, 0.999))
        for name, module in networks.items()
    }

    def step(number: int) -> dict[str, float]:
        for optimizer in optimizers.values():
            set_cosine_lr(optimizer, stage.lr, number, stage.steps)
        random = draws(config.seed, f"style {domain}", number)
        x = normalize(_some(people.source.images, stage.batch_size, random))
        wanted = normalize(_some(people.target.images, stage.batch_size, random))
        wanted = degrade(wanted, domain, random).to(device)
        x = x.to(device)
        o = normals((len(x), config.generator.styles), random).to(device)
        anchor = number % 2 == 1
        drawn = generator(x, torch.zeros_like(o) if anchor else o)
        basis = generator.space.basis
        row = {kind: orthogonality_loss(basis.detach(), kind).item() for kind in ORTHOGONALITY}
        loss = stage.orthogonality_weight * orthogonality_loss(basis, stage.orthogonality)
        if anchor:
            pixels = (drawn - x).abs().mean()
            loss = loss + stage.anchor_weight * pixels
            row["anchor"] = pixels.item()
        else:
            discriminator.requires_grad_(False)
            adversarial = lsgan_loss(discriminator(drawn), 1.0)
            discriminator.requires_grad_(True)
            with torch.no_grad():
                own = recognizer(x)
            identity = identity_loss(own, recognizer(drawn), o.norm(dim=1))
            loss = loss + stage.adversarial_weight * adversarial + stage.identity_weight * identity
            row |= {"adversarial": adversarial.item(), "identity": identity.item()}
        descend(optimizers["generator"], loss)
        real, made = discriminator(wanted), discriminator(drawn.detach())
        judged = lsgan_loss(real, 1.0) + lsgan_loss(made, 0.0)
        descend(optimizers["discriminator"], judged)
        return row | {"discriminator": judged.item()}

    parts = ("recognizer", "generator", "discriminator", "style")
    with evaluating(recognizer), _frozen(recognizer):
        history = run_steps(
            folder,
            {
                "config": {"seed": config.seed, "domain": domain}
                | {part: asdict(getattr(config, part)) for part in parts},
                "data": people.fingerprints(),
            },
            networks,
            optimizers,
            step,
            stage,
            **options,
        )
    return generator.eval().requires_grad_(False), history


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a module's parameters temporarily."""
    learned = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


def _some(images: Tensor, count: int, random: torch.Generator) -> Tensor:
    return images[torch.randint(len(images), (count,), generator=random, device="cpu")]


@torch.no_grad()
def strength_sweep(
    generator: Generator, recognizer: nn.Module, images: Tensor, strengths: Tensor, seed: int
) -> dict[str, Tensor]:
    """Return the mean cosine of f(X) and f(G(X, o)) at each strength ‖o‖.

    Args:
        images: (N, C, H, W) in [−1, 1]. strengths: (A,).

    Returns:
        "axes": (q, A), along each u_i; "random": (A,), along a random direction per image, the same
        at every strength.
    """
    size = generator.config.styles
    directions = normals((len(images), size), draws(seed, "sweep", 0))
    directions = F.normalize(directions).to(images.device)
    with evaluating(recognizer):
        own = recognizer(images)

        def cosines(direction: Tensor) -> Tensor:
            return torch.stack(
                [
                    F.cosine_similarity(own, recognizer(generator(images, a * direction)))
                    .mean()
                    .cpu()
                    for a in strengths.tolist()
                ]
            )

        axes = torch.eye(size, dtype=torch.float32, device=images.device)
        return {
            "axes": torch.stack([cosines(axis.expand(len(images), -1)) for axis in axes]),
            "random": cosines(directions),
        }


def similarities(generators: dict[str, Generator]) -> Tensor:
    """Return the (n, n) float64 similarities S(A, B) of every two subspaces."""
    spaces = [generator.space for generator in generators.values()]
    rows = [[subspace_similarity(a, b) for b in spaces] for a in spaces]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
