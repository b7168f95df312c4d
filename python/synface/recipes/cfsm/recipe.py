"""CFSM from data to report: a recognizer, style subspaces, guided training, and verification.

The source's people are split: the first are for training the recognizer and the generators, the
next (or a separate folder), degraded, are the unlabeled target domains, and the last are for
verification. Each part has its own folder with checkpoints below the output, and can be resumed.

Source: Liu, Kim, Jain, Liu, "Controllable and Guided Face Synthesis for Unconstrained Face
Recognition", ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.check import check_device
from ...common.rng import standard_defaults
from ...data import Faces
from ...evaluation.embedding import embed
from ...evaluation.metrics import verify
from ...heads import MarginHead
from ...training.model import check_network
from ..sweep import Bars, no_bars, train_or_resume
from .config import CfsmConfig
from .faces import People, degraded, first_images, read_people
from .guided import VARIANTS, guided_gain, train_guided
from .model import Discriminator, Generator
from .style import learn_style, similarities, strength_sweep

Log = list[dict[str, float]]


@dataclass(frozen=True, eq=False)
class Results:
    """The results of the recipe, for the report.

    Attributes:
        style_log: by domain, the metrics of stage 1. sweep: by domain, see `strength_sweep`.
        strengths: (A,). similarity: (n, n). gain: see `guided_gain`.
        guided_log, verification: by variant; the latter then by domain, with "clean" first.
    """

    config: CfsmConfig
    people: People
    generators: dict[str, Generator]
    style_log: dict[str, Log]
    strengths: Tensor
    sweep: dict[str, dict[str, Tensor]]
    similarity: Tensor
    gain: dict[str, Tensor]
    guided_log: dict[str, Log]
    verification: dict[str, dict[str, Any]]


def run(
    config: CfsmConfig, output: Path, *, resume: bool = False, progress: Bars | None = None
) -> Results:
    """Train everything below ``output``, and measure it.

    Args:
        resume: resume the run there; the result is bitwise that of an uninterrupted run.
        progress: makes a progress bar for each part from its description.

    Raises:
        FileExistsError, CheckpointError, FloatingPointError, KeyboardInterrupt,
            Terminated: see `run_steps`.
    """
    bar = progress or no_bars
    device = check_device(config.device)
    _check_networks(config)
    people = read_people(config.data, config.seed)
    earlier = output / "recogniser"  # its name in version 0.1
    folder = earlier if earlier.exists() else output / "recognizer"
    with bar("recognizer") as shown:
        trained = train_or_resume(config.recognizer, people.source, folder, resume, shown)
    assert isinstance(trained.head, MarginHead)  # this is one process
    recognizer, head = trained.backbone.to(device).eval(), trained.head.to(device)

    def stage(part: str, name: str, train: Callable[..., Any], *arguments: Any) -> Any:
        arguments = (config, people, recognizer, *arguments, name, output / part / name)
        with bar(f"{part}: {name}") as shown:
            return train(*arguments, resume=resume, progress=shown)

    generators, style_log = {}, {}
    for domain in config.domains:
        generators[domain], style_log[domain] = stage("style", domain, learn_style)
    faces = first_images(people.held, 64).to(device)
    strengths = torch.linspace(0.0, 6.0, 13, dtype=torch.float32, device="cpu")
    sweep = {}
    with bar("strength sweep") as shown:
        if shown:
            shown.start(len(generators), 0)
        for domain, generator in generators.items():
            sweep[domain] = strength_sweep(generator, recognizer, faces, strengths, config.seed)
            if shown:
                shown.advance(domain)
    generator = generators[config.guided.domain]
    gain = guided_gain(config, generator, recognizer, head, people.source)

    guided_log, verification = {}, {"before": _verify(config, recognizer, people.held)}
    for variant in VARIANTS:
        network, guided_log[variant] = stage("guided", variant, train_guided, head, generator)
        verification[variant] = _verify(config, network, people.held)
    return Results(
        config,
        people,
        generators,
        style_log,
        strengths,
        sweep,
        similarities(generators),
        gain,
        guided_log,
        verification,
    )


def _check_networks(config: CfsmConfig) -> None:
    """Raise ValueError unless all networks fit the images, without allocating them."""
    size = config.data.size
    check_network(config.recognizer, (size, size, 1))
    with standard_defaults(), torch.device("meta"):
        make = partial(torch.empty, dtype=torch.float32, device="meta")
        image, style = make(1, 1, size, size), make(1, config.generator.styles)
        Generator(config.generator)(image, style)
        Discriminator(config.discriminator)(image)


def _verify(config: CfsmConfig, network: nn.Module, held: Faces) -> dict[str, Any]:
    sets = {"clean": held} | {d: degraded(held, d, config.seed) for d in config.domains}
    return {name: verify(embed(network, each.images), each.labels) for name, each in sets.items()}
