"""CFSM from data to report: a recognizer, style subspaces, guided training, and verification.

The source's people are split: the first are for training the recognizer and the generators, the
next (or a separate folder), degraded, are the unlabeled target domains, and the last are for
verification. Each part has its own folder with checkpoints below the output, and can be resumed.

Source: Liu, Kim, Jain, Liu, "Controllable and Guided Face Synthesis for Unconstrained Face
Recognition", ECCV 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.check import check_integer
from ...common.rng import standard_defaults
from ...training.model import check_network
from ..sweep import Bars, default_workers, no_bars, share_of_threads, trained_on, using_threads
from ..workers import Prepare, run_named
from .config import CfsmConfig
from .faces import People, read_people
from .measures import words
from .model import Discriminator, Generator
from .parts import RECOGNIZER, STRENGTHS, STYLE, Part, Trainer, parts, trained_by_title
from .style import new_networks, similarities

Log = list[dict[str, float]]
UNTRAINED = "untrained"  # the generator that every domain starts from


@dataclass(frozen=True, eq=False)
class Results:
    """The results of the recipe, for the report.

    Attributes:
        generators: by domain, of the first seed.
        found: by part, what `Trainer.train` returned, in JSON types.
        strengths: (A,). similarity: (n, n), of the domains' subspaces and an untrained one.
    """

    config: CfsmConfig
    people: People
    generators: dict[str, Generator]
    found: dict[Part, dict[str, Any]]
    strengths: Tensor
    similarity: Tensor

    def style(self, domain: str, seed: int = 0) -> dict[str, Any]:
        """Return what was found of a style space."""
        return self.found[Part(STYLE, seed, domain)]

    def machine(self) -> str:
        """Return the processor, versions, the parts' threads and their seconds."""
        return trained_on(found["took"] for found in self.found.values())

    @property
    def ablations(self) -> dict[str, dict[str, Any]]:
        """The guided domain's style spaces by the addition that they lack, see `style`."""
        return {part.without: found for part, found in self.found.items() if part.without}

    @property
    def gain(self) -> dict[str, Tensor]:
        """The `guided_gain` in the styles of the guided domain, of the first seed."""
        return _tensors(self.style(self.config.guided.domain)["gain"])

    def over_seeds(self, part: Part) -> list[dict[str, Any]]:
        """Return what was found of a network of stage 2, or of its recognizer, with each seed."""
        return [self.found[replace(part, seed=i)] for i in range(self.config.guided.seeds)]


def sweep(style: dict[str, Any]) -> dict[str, Tensor]:
    """Return the `strength_sweep` of what was found of a style space."""
    return _tensors(style["sweep"])


def axis_words(style: dict[str, Any]) -> list[list[str]]:
    """Return the `words` for the axes of what was found of a style space."""
    return words(_tensors(style["measures"]["effects"]))


def _tensors(found: dict[str, Any]) -> dict[str, Tensor]:
    """Return lists of numbers as float32 tensors."""
    return {
        name: torch.tensor(values, dtype=torch.float32, device="cpu")
        for name, values in found.items()
    }


def run(
    config: CfsmConfig,
    output: Path,
    *,
    resume: bool = False,
    progress: Bars | None = None,
    workers: int | None = 1,
    ablations: bool = False,
) -> Results:
    """Train everything below ``output``, and measure it.

    Args:
        resume: resume the run there; the result is bitwise that of an uninterrupted run.
        progress: makes a progress bar from its description: of each part, or with workers, of all
            parts of a stage.
        workers: number of processes that train; 1: this process; None: see `run_cells`. Results
            depend on the number of threads.
        ablations: learn the guided domain's styles also without each addition, and without all.

    Raises:
        ValueError: for data that cannot be used, too few workers, or ablations of nothing.
        FileExistsError, CheckpointError, FloatingPointError, KeyboardInterrupt,
            Terminated: see `run_steps`.
        ChildProcessError: if a worker dies.
    """
    workers = default_workers() if workers is None else workers
    check_integer("workers", workers, 1)
    groups = parts(config, ablations)
    _check_networks(config, config.data.channels)
    people = read_people(config.data, config.seed)
    if people.channels != config.data.channels:  # a folder's
        _check_networks(config, people.channels)
    found: dict[Part, dict[str, Any]] = {}
    threads = share_of_threads(workers)
    with using_threads(threads):
        trainer = Trainer(config, people, output, resume=resume)
        prepare = partial(trained_by_title, config, output, resume, ablations)
        for group in groups:
            found |= {part: each for part in group if (each := trainer.stored(part)) is not None}
            left = [part for part in group if part not in found]
            if workers > 1 and left:
                found |= _in_workers(config, people, prepare, progress, workers, left)
                continue
            for part in left:
                with (progress or no_bars)(part.title(config)) as trainer.progress:
                    found[part] = trainer.train(part)
        generators = {
            domain: trainer.generator(Part(STYLE, 0, domain))[0] for domain in config.domains
        }
    untrained = new_networks(config, people.channels)[0]
    return Results(
        config,
        people,
        generators,
        {part: found[part] for group in groups for part in group},
        STRENGTHS,
        similarities(generators | {UNTRAINED: untrained}),
    )


def _in_workers(
    config: CfsmConfig,
    people: People,
    prepare: Prepare,
    progress: Bars | None,
    workers: int,
    group: list[Part],
) -> dict[Part, dict[str, Any]]:
    """Train parts that do not need each other in workers."""
    titles = {part.title(config): part for part in group}
    total = sum(planned_steps(config, part, len(people.source)) for part in group)
    processes = min(workers, len(group))
    title = f"{len(group)} parts of {group[0].kind}, {processes} workers"
    with (progress or no_bars)(title) as bar:

        def update(results: int, done: int, more: int) -> None:
            if bar:
                bar.start(total + more, done)

        found = run_named(list(titles), prepare, processes, torch.get_num_threads(), update)
    return {part: found[title] for title, part in titles.items()}


def planned_steps(config: CfsmConfig, part: Part, images: int) -> int:
    """Return the number of training steps of a part, on so many source images."""
    if part.kind == RECOGNIZER:
        return config.recognizer.epochs * -(-images // config.recognizer.batch_size)
    return (config.style if part.kind == STYLE else config.guided).steps


def _check_networks(config: CfsmConfig, channels: int) -> None:
    """Raise ValueError unless all networks fit the images, without allocating them."""
    size = config.data.size
    check_network(config.recognizer, (size, size, channels))
    with standard_defaults(), torch.device("meta"):
        make = partial(torch.empty, dtype=torch.float32, device="meta")
        image, style = make(1, channels, size, size), make(1, config.generator.styles)
        Generator(config.generator, channels)(image, style)
        Discriminator(config.discriminator, channels)(image)
