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
from ...data import Faces, normalize
from ..generated import EMBEDDED
from ..loop import descend, run_steps, set_cosine_lr
from .additions import StatisticsLoss, StylePredictor
from .config import ADDED, CfsmConfig, alone
from .degrade import degrade
from .faces import People, first_images
from .measures import axis_effects, controllability, matching, recovery
from .model import (
    ORTHOGONALITY,
    Discriminator,
    Generator,
    identity_loss,
    lsgan_loss,
    orthogonality_loss,
    subspace_similarity,
)

BANK = 512  # target images whose statistics are matched
MEASURED = 512  # held-out images whose statistics are measured


def new_networks(
    config: CfsmConfig, channels: int
) -> tuple[Generator, Discriminator, StylePredictor]:
    """Return the networks of stage 1 as they start, the same for every domain."""
    device = check_device(config.device)
    with seeded(seeds(config.seed, "style parameters", 0)), standard_defaults():
        return (
            Generator(config.generator, channels).to(device),
            Discriminator(config.discriminator, channels).to(device),
            StylePredictor(channels, config.generator.styles).to(device),
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

    As in the authors' code, steps alternate: one draws o ~ N(0, I) for all terms but the anchor,
    the next sets o = 0 and compares the image itself with its redrawing (the anchor). Every domain
    starts from the same parameters, so that their subspaces can be compared.

    Args:
        recognizer: f, whose parameters and mode are not changed.
        options: see `run_steps`.

    Raises:
        ValueError: for a domain that is not known.
        FloatingPointError: for a loss or a parameter that is not finite; see `run_steps`.
    """
    stage, device = config.style, check_device(config.device)
    generator, discriminator, predictor = new_networks(config, people.channels)
    networks: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
    drawing = [*generator.parameters()]
    if stage.recovery_weight:
        networks["predictor"] = predictor
        drawing += predictor.parameters()
    betas = (0.5, 0.999)
    optimizers = {
        "generator": torch.optim.Adam(drawing, stage.lr, betas),
        "discriminator": torch.optim.Adam(discriminator.parameters(), stage.lr, betas),
    }
    statistics = None
    if stage.statistics_weight:
        bank = draws(config.seed, f"target statistics {domain}", 0)
        statistics = StatisticsLoss(_targets(people.target, BANK, domain, bank).to(device))

    def drawn_terms(x: Tensor, drawn: Tensor, o: Tensor) -> dict[str, Tensor]:
        """Return the loss terms of images drawn in a random style."""
        discriminator.requires_grad_(False)
        terms = {"adversarial": lsgan_loss(discriminator(drawn), 1.0)}
        discriminator.requires_grad_(True)
        with torch.no_grad():
            own = recognizer(x)
        terms["identity"] = identity_loss(own, recognizer(drawn), o.norm(dim=1))
        if stage.recovery_weight:
            terms["recovery"] = F.mse_loss(predictor(drawn, x), o)
        if statistics:
            terms["statistics"] = statistics(drawn)
        return terms

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
        if anchor:
            o = torch.zeros_like(o)
        with seeded(seeds(config.seed, f"noise {domain}", number), device):
            drawn = generator(x, o)
        basis = generator.space.basis
        row = {kind: orthogonality_loss(basis.detach(), kind).item() for kind in ORTHOGONALITY}
        terms = {"anchor": (drawn - x).abs().mean()} if anchor else drawn_terms(x, drawn, o)
        row |= {name: term.item() for name, term in terms.items()}
        terms = {"orthogonality": orthogonality_loss(basis, stage.orthogonality)} | terms
        total = sum(getattr(stage, f"{name}_weight") * term for name, term in terms.items())
        descend(optimizers["generator"], total)
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
                | {part: asdict(getattr(alone(config), part)) for part in parts},
                "data": people.fingerprints(),
            },
            networks,
            optimizers,
            step,
            stage,
            added=ADDED,
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


def _targets(faces: Faces, count: int, domain: str, random: torch.Generator) -> Tensor:
    """Return ``count`` random images of a target domain, 16 at a time: a batch has one blur."""
    batches = [_some(faces.images, 16, random) for _ in range(count // 16)]
    return torch.cat([degrade(normalize(images), domain, random) for images in batches])


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
            found = []
            for a in strengths.tolist():
                with seeded(seeds(seed, "sweep noise", 0), images.device):  # one noise map for all
                    drawn = generator(images, a * direction)
                found.append(F.cosine_similarity(own, recognizer(drawn)).mean().cpu())
            return torch.stack(found)

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


def measure_style(
    config: CfsmConfig, people: People, generator: Generator, domain: str
) -> dict[str, Any]:
    """Measure a style space on the held-out people.

    Generated images are compared with degraded images of the same people, drawn independently, or
    with the target images themselves where they come from a folder.

    Args:
        generator: of the domain, in evaluation mode; float32.

    Raises:
        ValueError: for a domain that is not known.

    Memory: about `MEASURED` images and their features in the generator.

    Returns:
        In JSON types: "controllability", see `controllability`, with "recovery R²", see
        `recovery_of`; "matching", see `matching`; "effects", see `axis_effects`.
    """
    device = check_device(config.device)
    random = draws(config.seed, f"measure {domain}", 0)
    held = normalize(_some(people.held.images, MEASURED, random)).to(device)
    wanted = people.held if config.data.target == EMBEDDED else people.target
    target = _targets(wanted, MEASURED, domain, random).to(device)
    styles = generator.config.styles
    o, noise = (normals(shape, random).to(device) for shape in ((len(held), styles), held.shape))
    faces = first_images(people.held, 25).to(device)
    fixed = normals(faces.shape, random).to(device)

    def draw(images: Tensor, o: Tensor) -> Tensor:
        return generator(images, o, fixed)

    with torch.no_grad():
        found = controllability(draw, faces, styles, config.seed)
        effects = axis_effects(draw, faces, styles)
        matched = matching(generator(held, o, noise), target, held)
    found["recovery R²"] = recovery_of(config, people, generator, domain)
    return {
        "controllability": found,
        "matching": matched,
        "effects": {name: values.tolist() for name, values in effects.items()},
    }


def recovery_of(
    config: CfsmConfig,
    people: People,
    generator: Generator,
    domain: str,
    batch_size: int = 32,
    lr: float = 2e-3,
) -> float:
    """Return R² of the styles that a network predicts from images and their change.

    A new `StylePredictor` is trained on the frozen generator's images of the source people, for 600
    steps, but no more than the generator was, and tested on those of held-out people.

    Args:
        generator: of the domain, in evaluation mode; float32.
        batch_size, lr: of the training.
    """
    steps = min(600, config.style.steps)
    device = check_device(config.device)
    with seeded(seeds(config.seed, "recovery parameters", 0)), standard_defaults():
        predictor = StylePredictor(people.channels, generator.config.styles).to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr)

    def drawn(faces: Faces, count: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        random = draws(config.seed, f"recovery {domain}", number)
        x = normalize(_some(faces.images, count, random)).to(device)
        o = normals((count, generator.config.styles), random).to(device)
        with torch.no_grad():
            return x, o, generator(x, o, normals(x.shape, random).to(device))

    for number in range(steps):
        set_cosine_lr(optimizer, lr, number, steps)
        x, o, y = drawn(people.source, batch_size, number)
        descend(optimizer, F.mse_loss(predictor(y, x), o))
    x, o, y = drawn(people.held, MEASURED, steps)
    with torch.no_grad():
        return recovery(predictor(y, x), o)
