"""Parts of a CFSM run: recognizers, style spaces and guided networks, each in its own folder.

Each part is trained and measured by its name, in this process or in a worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.check import check_device
from ...common.files import CheckpointError, write_text
from ...common.textfiles import read_json
from ...data import Faces
from ...evaluation.embedding import embed
from ...evaluation.metrics import verify
from ...heads import MarginHead
from ..sweep import RESULT, train_or_resume
from ..workers import Steps
from .config import ALL, CfsmConfig, additions, alone, without
from .faces import People, degraded, first_images, read_people
from .guided import VARIANTS, guided_gain, train_guided
from .model import Generator
from .style import learn_style, measure_style, strength_sweep

RECOGNIZER, STYLE, GUIDED = "recognizer", "style", "guided"
STRENGTHS = torch.linspace(0.0, 6.0, 13, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Part:
    """One trained part.

    Attributes:
        kind: of RECOGNIZER, STYLE and GUIDED.
        seed: of the paired seeds; it is added to those of the configuration.
        name: a style's domain, or a guided network's variant.
        originals, epsilon: of a guided network, where they are not the configuration's.
        without: the addition that a style space lacks, see `without`.
    """

    kind: str
    seed: int
    name: str = ""
    originals: float | None = None
    epsilon: float | None = None
    without: str = ""

    def title(self, config: CfsmConfig) -> str:
        """Return the name of the part, which is also its folder below the output."""
        words = [self.name] if self.name else []
        if self.originals is not None:
            words.append(f"{self.originals:g}")
        if self.epsilon is not None:
            words.append(f"epsilon-{self.epsilon:g}")
        if self.without:
            words.append(f"without-{self.without}")
        if self.seed:
            words.append(f"seed-{config.seed + self.seed}")
        separator = "/" if self.name else "-"
        return separator.join(filter(None, [self.kind, "-".join(words)]))


def parts(config: CfsmConfig, ablations: bool = False) -> list[list[Part]]:
    """Return the parts in the order of training; those of one list do not need each other.

    Args:
        ablations: learn the guided domain's styles also without each addition, and without all.

    Raises:
        ValueError: for ``ablations`` of a configuration without additions.
    """
    left_out = additions(config) if ablations else []
    if ablations and not left_out:
        raise ValueError("ablations need additions to leave out, and the configuration has none")
    if len(left_out) > 1:
        left_out.append(ALL)
    styles, seeds = config.style, range(config.guided.seeds)
    return [
        [Part(RECOGNIZER, seed) for seed in range(max(styles.seeds, config.guided.seeds))],
        [Part(STYLE, 0, domain) for domain in config.domains]
        + [Part(STYLE, seed, config.guided.domain) for seed in range(1, styles.seeds)]
        + [Part(STYLE, 0, config.guided.domain, without=name) for name in left_out],
        [replace(part, seed=seed) for seed in seeds for part in guided_parts(config)],
    ]


def guided_parts(config: CfsmConfig) -> list[Part]:
    """Return the networks of stage 2, those of the first seed."""
    stage = config.guided
    redrawn = [name for name in VARIANTS if name != "originals"]
    return (
        [Part(GUIDED, 0, name) for name in VARIANTS]
        + [Part(GUIDED, 0, name, share) for share in stage.other_originals for name in redrawn]
        + [Part(GUIDED, 0, "guided", epsilon=each) for each in stage.other_epsilons]
    )


class Trainer:
    """Trains, restores and measures the parts of a run.

    Args:
        resume: resume parts that were begun.
        progress: display of the steps of whatever is trained.
    """

    def __init__(
        self,
        config: CfsmConfig,
        people: People,
        output: Path,
        *,
        resume: bool = False,
        progress: Any = None,
    ) -> None:
        self.config, self.people, self.output = config, people, output
        self.resume, self.progress = resume, progress
        self.device = check_device(config.device)
        self._recognizers: dict[int, tuple[nn.Module, MarginHead]] = {}
        self._generators: dict[Part, tuple[Generator, list[dict[str, float]]]] = {}

    def train(self, part: Part) -> dict[str, Any]:
        """Train a part, whose folder must be new unless it is resumed; return its measures.

        They are stored in its folder, see `stored`.

        Returns:
            In JSON types: "took", with "seconds", None if the part was begun before, and "threads";
            a recognizer's "verification"; a style space's "log" and "measures", with its "sweep"
            unless an addition is left out, and "gain" where it is the first of the guided domain; a
            guided network's "log" and "verification".
        """
        folder, began = self._folder(part), time.perf_counter()
        begun = folder.exists()
        found = getattr(self, f"_{part.kind}")(part)
        found["took"] = {
            "seconds": None if begun else time.perf_counter() - began,
            "threads": torch.get_num_threads(),
        }
        stored = {"made_of": self._made_of(part), "found": found}
        write_text(folder / RESULT, json.dumps(stored) + "\n")
        return found

    def stored(self, part: Part) -> dict[str, Any] | None:
        """Return the measures of a part that a resumed run finds finished, see `train`."""
        file = self._folder(part) / RESULT
        if not (self.resume and file.exists()):
            return None
        stored = read_json(file, CheckpointError)
        same = isinstance(stored, dict) and stored.get("made_of") == self._made_of(part)
        return stored["found"] if same else None

    def _made_of(self, part: Part) -> dict[str, Any]:
        """Return what a part's measures depend on, in JSON types."""
        made_of = {
            "part": asdict(part),
            "config": asdict(alone(self._seeded(part))),
            "data": self.people.fingerprints(),
            "style": asdict(self._style_of(part)) if part.kind == GUIDED else None,
        }
        return json.loads(json.dumps(made_of))

    def _style_of(self, part: Part) -> Part:
        """Return the style space that a guided network takes; the seeds take them in turn."""
        return Part(STYLE, part.seed % self.config.style.seeds, self.config.guided.domain)

    def generator(self, part: Part) -> tuple[Generator, list[dict[str, float]]]:
        """Return the generator of a trained part, with its log."""
        if part not in self._generators:
            self._learn(part)
        return self._generators[part]

    def _seeded(self, part: Part) -> CfsmConfig:
        """Return the configuration with a part's seed."""
        config = without(self.config, part.without) if part.without else self.config
        recognizer = replace(config.recognizer, seed=config.recognizer.seed + part.seed)
        return replace(config, seed=config.seed + part.seed, recognizer=recognizer)

    def _folder(self, part: Part) -> Path:
        folder = self.output / part.title(self.config)
        earlier = self.output / "recogniser"  # the first one's name in version 0.1
        return earlier if part == Part(RECOGNIZER, 0) and earlier.exists() else folder

    # -- recognizers -----------------------------------------------------------------------------

    def _recognizer(self, part: Part) -> dict[str, Any]:
        network, _ = self._recognize(part.seed, resume=self.resume, progress=self.progress)
        return {"verification": self._verify(network)}

    def _recognize(
        self, seed: int, *, resume: bool = True, progress: Any = None
    ) -> tuple[nn.Module, MarginHead]:
        """Return a recognizer and its head, trained here or restored."""
        if seed not in self._recognizers:
            part = Part(RECOGNIZER, seed)
            config, folder = self._seeded(part).recognizer, self._folder(part)
            trained = train_or_resume(config, self.people.source, folder, resume, progress)
            assert isinstance(trained.head, MarginHead)  # this is one process
            network = trained.backbone.to(self.device).eval()
            self._recognizers[seed] = network, trained.head.to(self.device)
        return self._recognizers[seed]

    @cached_property
    def _verified(self) -> dict[str, Faces]:
        """Return the held-out people by domain, "clean" first."""
        held, seed = self.people.held, self.config.seed
        return {"clean": held} | {d: degraded(held, d, seed) for d in self.config.domains}

    def _verify(self, network: nn.Module) -> dict[str, Any]:
        return {
            name: verify(embed(network, each.images), each.labels).to_json()
            for name, each in self._verified.items()
        }

    # -- stage 1 ---------------------------------------------------------------------------------

    def _style(self, part: Part) -> dict[str, Any]:
        self._learn(part, resume=self.resume, progress=self.progress)
        generator, log = self._generators[part]
        recognizer, head = self._recognize(part.seed)
        config = self._seeded(part)
        found = {"log": log, "measures": measure_style(config, self.people, generator, part.name)}
        tensors: dict[str, dict[str, Tensor]] = {}
        if not part.without:
            faces = first_images(self.people.held, 64).to(self.device)
            tensors["sweep"] = strength_sweep(generator, recognizer, faces, STRENGTHS, config.seed)
        if part == Part(STYLE, 0, config.guided.domain):
            tensors["gain"] = guided_gain(config, generator, recognizer, head, self.people.source)
        # Lists: a worker's tensors would be shared with this process, and end with the worker.
        return found | {
            key: {name: values.tolist() for name, values in each.items()}
            for key, each in tensors.items()
        }

    def _learn(self, part: Part, *, resume: bool = True, progress: Any = None) -> None:
        recognizer, _ = self._recognize(part.seed)
        self._generators[part] = learn_style(
            self._seeded(part),
            self.people,
            recognizer,
            part.name,
            self._folder(part),
            resume=resume,
            progress=progress,
        )

    # -- stage 2 ---------------------------------------------------------------------------------

    def _guided(self, part: Part) -> dict[str, Any]:
        config = self._seeded(part)
        stage = alone(config).guided
        if part.originals is not None:
            stage = replace(stage, originals=part.originals)
        if part.epsilon is not None:
            stage = replace(stage, epsilon=part.epsilon)
        space = self._style_of(part)
        network, log = train_guided(
            replace(config, guided=stage),
            self.people,
            *self._recognize(part.seed),
            self.generator(space)[0],
            part.name,
            self._folder(part),
            space=space.seed,
            resume=self.resume,
            progress=self.progress,
        )
        return {"log": log, "verification": self._verify(network)}


def trained_by_title(
    config: CfsmConfig, output: Path, resume: bool, ablations: bool, steps: Steps
) -> Callable[[str], dict[str, Any]]:
    """Return the function that trains a part by its title, in a worker."""
    people = read_people(config.data, config.seed)
    trainer = Trainer(config, people, output, resume=resume, progress=steps)
    by_title = {part.title(config): part for group in parts(config, ablations) for part in group}
    return lambda title: trainer.train(by_title[title])
