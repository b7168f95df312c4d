"""Stage 2 of CFSM: continued training on images in styles that raise the recognizer's loss."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.check import check_device
from ...common.modes import evaluating
from ...common.rng import generator as draws
from ...common.rng import normals, seeded, seeds
from ...data import Augment, Faces, normalize
from ...heads import MarginHead
from ..loop import descend, run_steps, set_cosine_lr
from .config import ADDED, CfsmConfig, alone
from .faces import People
from .model import Generator, guided_styles

VARIANTS = ("originals", "random", "guided")  # images that make up the rest of each batch


def train_guided(
    config: CfsmConfig,
    people: People,
    recognizer: nn.Module,
    head: MarginHead,
    generator: Generator,
    variant: str,
    folder: Path,
    *,
    space: int = 0,
    **options: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a copy of the recognizer further; return it in evaluation mode, with its log.

    Args:
        variant: "guided" redraws all but a share of each batch in guided styles, "random" in
            styles o ~ N(0, I), "originals" redraws none. Images, labels and o are drawn alike in
            all three.
        space: index of the generator's style space, stored in checkpoints.
        options: see `run_steps`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    stage, device = config.guided, check_device(config.device)
    network, centers = deepcopy(recognizer).to(device), deepcopy(head).to(device)
    learned = [*network.parameters(), *centers.parameters()]
    learned = [p for p in learned if p.requires_grad]
    optimizer = torch.optim.SGD(learned, stage.lr, 0.9, nesterov=True)
    augment = Augment(config.recognizer.augment)
    originals = round(stage.originals * stage.batch_size)

    def step(number: int) -> dict[str, float]:
        set_cosine_lr(optimizer, stage.lr, number, stage.steps)
        random = draws(config.seed, "guided", number)
        images, y = _batch(people.source, stage.batch_size, random)
        x, y = augment(images, random).to(device), y.to(device)
        o = normals((len(x) - originals, config.generator.styles), random).to(device)
        noise = seeds(config.seed, "guided noise", number)
        if variant != "originals" and len(o):
            if variant == "guided":
                with seeded(noise, device):
                    o = guided_styles(
                        generator,
                        network,
                        centers.weight,
                        x[originals:],
                        y[originals:],
                        o,
                        centers.margin,
                        stage.epsilon,
                    )
            with torch.no_grad(), seeded(noise, device):  # the noise map that o was chosen for
                x[originals:] = generator(x[originals:], o)
        with seeded(seeds(config.seed, "guided dropout", number), device):
            loss, stats = centers(network(x), y, return_stats=True)
        descend(optimizer, loss)
        return {"loss": loss.item(), "accuracy": stats.top1.float().mean().item()}

    network.train()
    history = run_steps(
        folder,
        {
            "config": {
                "variant": variant,
                # Earlier stages affect the result too; of the domains, only this stage's.
                "recipe": asdict(alone(config)) | {"domains": [stage.domain], "space": space},
            },
            "data": people.fingerprints(),
        },
        {"backbone": network, "head": centers},
        {"sgd": optimizer},
        step,
        stage,
        added=ADDED,
        **options,
    )
    return network.eval(), history


@torch.no_grad()
def guided_gain(
    config: CfsmConfig,
    generator: Generator,
    recognizer: nn.Module,
    head: MarginHead,
    source: Faces,
    batches: int = 20,
) -> dict[str, Tensor]:
    """Return the recognizer's losses at o ~ N(0, I), o + ε·(random signs) and o*; (batches,)."""
    device = check_device(config.device)
    losses: dict[str, list[Tensor]] = {"style": [], "random": [], "guided": []}
    for number in range(batches):
        random = draws(config.seed, "gain", number)
        images, y = _batch(source, config.guided.batch_size, random)
        x, y = normalize(images).to(device), y.to(device)
        o = normals((len(x), config.generator.styles), random)
        signs = torch.randint(2, o.shape, generator=random, device="cpu").float() * 2.0 - 1.0
        o, signs = o.to(device), signs.to(device)
        epsilon, noise = config.guided.epsilon, seeds(config.seed, "gain noise", number)
        with seeded(noise, device):
            guided = guided_styles(
                generator, recognizer, head.weight, x, y, o, head.margin, epsilon
            )
        styles = {"style": o, "random": o + epsilon * signs, "guided": guided}
        with evaluating(recognizer):
            for name, each in styles.items():
                with seeded(noise, device):  # one noise map for all
                    drawn = generator(x, each)
                losses[name].append(head(recognizer(drawn), y).cpu())
    return {name: torch.stack(values) for name, values in losses.items()}


def _batch(faces: Faces, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(faces), (count,), generator=random, device="cpu")
    return faces.images[chosen], faces.labels[chosen]
