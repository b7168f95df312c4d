"""CFSM from data to report: a recogniser, style subspaces, guided training, and what came out.

Of the source's people, the first train the recogniser and the generators, the next ones (or a
folder of their own) are the unlabeled target domains once degraded, the last verify. Every part
has a folder of its own below the output, with checkpoints, and can be resumed.

Source: Liu, Kim, Jain, Liu, "Controllable and Guided Face Synthesis for Unconstrained Face
Recognition", ECCV 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.check import check_device, check_integer, check_number
from ...common.config import load
from ...common.rng import generator as draws
from ...common.rng import normals, seeded, seeds, standard_defaults
from ...data import Augment, Faces, embedded_faces, normalize, read_folder
from ...evaluation.metrics import embed, verify
from ...heads import MarginHead
from ...training.config import TrainConfig
from ...training.loop import CONFIG, train
from ...training.model import check_network
from ...training.sources import fingerprint
from ..loop import run_steps
from .degrade import DOMAINS, degrade
from .model import (
    EPSILON,
    ORTHOGONALITY,
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    evaluating,
    guided_styles,
    identity_loss,
    lsgan_loss,
    orthogonality_loss,
    subspace_similarity,
)

EMBEDDED = "embedded"
VARIANTS = ("originals", "random", "guided")  # what stage 2 adds to the originals: nothing, …


@dataclass(frozen=True)
class DataConfig:
    """Which faces; see cfsm.toml."""

    faces: str = EMBEDDED
    target: str = EMBEDDED
    size: int = 112
    images_per_identity: int = 12
    target_identities: int = 20
    held_out_identities: int = 25

    def __post_init__(self) -> None:
        for name, least in (
            ("size", 16),
            ("images_per_identity", 2),
            ("target_identities", 1 if self.target == EMBEDDED else 0),
            ("held_out_identities", 2),
        ):
            check_integer(name, getattr(self, name), least)


@dataclass(frozen=True)
class StyleConfig:
    """Stage 1: the loss is Σ weight·L, over adversarial, orthogonality, identity and anchor.

    Attributes:
        lr: of Adam(0.5, 0.999), falling to 0 along a cosine.
        orthogonality: which `orthogonality_loss`.
    """

    steps: int = 100_000
    batch_size: int = 64
    lr: float = 1e-4
    orthogonality: str = "l1"
    adversarial_weight: float = 1.0
    orthogonality_weight: float = 1.0
    identity_weight: float = 8.0
    anchor_weight: float = 1.0
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            check_integer(name, getattr(self, name), 1)
        check_number("lr", self.lr, 0.0)
        for name in (f.name for f in fields(self) if f.name.endswith("_weight")):
            check_number(name, getattr(self, name), 0.0)
        if self.orthogonality not in ORTHOGONALITY:
            raise ValueError(
                f"orthogonality must be one of {ORTHOGONALITY}, got {self.orthogonality!r}"
            )


@dataclass(frozen=True)
class GuidedConfig:
    """Stage 2.

    Attributes:
        domain: whose styles.
        lr: of SGD with momentum 0.9, falling to 0 along a cosine.
        originals: share of each batch that stays as it is. epsilon: ε.
    """

    domain: str = "mixed"
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 0.02
    originals: float = 0.75
    epsilon: float = EPSILON
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            check_integer(name, getattr(self, name), 1)
        check_number("lr", self.lr, 0.0)
        check_number("originals", self.originals, 0.0, 1.0)
        check_number("epsilon", self.epsilon, 0.0)


@dataclass(frozen=True)
class CfsmConfig:
    """All of the recipe, as cfsm.toml has it; without it the sizes are the paper's."""

    seed: int = 0
    device: str = "cpu"
    domains: tuple[str, ...] = ("mixed",)
    data: DataConfig = field(default_factory=DataConfig)
    recogniser: TrainConfig = field(default_factory=TrainConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    style: StyleConfig = field(default_factory=StyleConfig)
    guided: GuidedConfig = field(default_factory=GuidedConfig)

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        unknown = [name for name in self.domains if name not in DOMAINS]
        if unknown or not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(
                f"domains must be different ones of {', '.join(DOMAINS)}, got {list(self.domains)}"
            )
        if self.guided.domain not in self.domains:
            raise ValueError(
                f"guided.domain must be one of domains, {list(self.domains)}, "
                f"got {self.guided.domain!r}"
            )


def load_config(file: Path | None = None) -> CfsmConfig:
    """A configuration from TOML; None takes the one beside this file. Errors: see `load`."""
    return load(CfsmConfig, file or Path(__file__).with_name("cfsm.toml"))


# -- data ----------------------------------------------------------------------------------------


def degraded(faces: Faces, domain: str, seed: int) -> Faces:
    """The set of faces, degraded: 16 images at a time share what is drawn once a batch."""
    batches = []
    for i, images in enumerate(faces.images.split(16)):
        x = degrade(normalize(images), domain, draws(seed, f"verify {domain}", i))
        batches.append(((x + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    return Faces(torch.cat(batches), faces.labels, faces.identities, f"{faces.source}, {domain}")


@dataclass(frozen=True)
class People:
    """The sets of faces: to train on, of the target domains before degradation, to verify on."""

    source: Faces
    target: Faces
    held: Faces

    @property
    def channels(self) -> int:
        return self.source.images.shape[3]


def read_people(config: DataConfig, seed: int) -> People:
    """Reads or makes the faces, and splits them by person.

    Raises:
        ValueError: where too few people are left to train on, or the channels differ.
        DataError: for a folder that cannot be read.
    """
    size = (config.size, config.size)
    if config.faces == EMBEDDED:
        faces = embedded_faces(config.images_per_identity, config.size, seed)
    else:
        faces = read_folder(Path(config.faces), size)
    rest, held = faces.split(config.held_out_identities)
    if config.target == EMBEDDED:
        source, target = rest.split(config.target_identities)
    else:
        source, target = rest, read_folder(Path(config.target), size, rest.images.shape[3] == 1)
    if target.images.shape[3] != source.images.shape[3]:
        raise ValueError(
            f"data.target must have {source.images.shape[3]} channels, as data.faces has, "
            f"got {target.images.shape[3]}"
        )
    return People(source, target, held)


def first_images(faces: Faces, count: int) -> Tensor:
    """(N, C, H, W) in [−1, 1]: the first image of each of the first ``count`` people."""
    people = range(min(count, len(faces.identities)))
    return normalize(torch.stack([faces.images[faces.labels == i][0] for i in people]))


# -- stage 1 -------------------------------------------------------------------------------------


def learn_style(
    config: CfsmConfig,
    people: People,
    recogniser: nn.Module,
    domain: str,
    folder: Path,
    **options: Any,
) -> tuple[Generator, list[dict[str, float]]]:
    """Stage 1 for one domain: the generator, in evaluation mode, and its log.

    As in the authors' code, steps take turns: one draws o ~ N(0, I) for L_adv and L_id, the next
    sets o = 0 and holds the image itself against its redrawing (the anchor). Every domain starts
    from the same parameters, so that their subspaces can be compared.

    Args:
        recogniser: f, whose parameters and mode are left as they are.
        options: of `run_steps`.
    """
    stage, device = config.style, check_device(config.device)
    with seeded(seeds(config.seed, "style parameters", 0)), standard_defaults():
        painter = Generator(config.generator, people.channels).to(device)
        critic = Discriminator(config.discriminator, people.channels).to(device)
    optimizers = {
        name: torch.optim.Adam(module.parameters(), stage.lr, (0.5, 0.999))
        for name, module in (("generator", painter), ("discriminator", critic))
    }

    def step(number: int) -> dict[str, float]:
        for optimizer in optimizers.values():
            _set_lr(optimizer, stage.lr, number, stage.steps)
        random = draws(config.seed, f"style {domain}", number)
        x = normalize(_some(people.source.images, stage.batch_size, random))
        wanted = normalize(_some(people.target.images, stage.batch_size, random))
        wanted = degrade(wanted, domain, random).to(device)
        x = x.to(device)
        o = normals((len(x), config.generator.styles), random).to(device)
        anchor = number % 2 == 1
        drawn = painter(x, torch.zeros_like(o) if anchor else o)
        basis = painter.space.basis
        row = {kind: orthogonality_loss(basis.detach(), kind).item() for kind in ORTHOGONALITY}
        loss = stage.orthogonality_weight * orthogonality_loss(basis, stage.orthogonality)
        if anchor:
            pixels = (drawn - x).abs().mean()
            loss = loss + stage.anchor_weight * pixels
            row["anchor"] = pixels.item()
        else:
            critic.requires_grad_(False)
            adversarial = lsgan_loss(critic(drawn), 1.0)
            critic.requires_grad_(True)
            with torch.no_grad():
                own = recogniser(x)
            identity = identity_loss(own, recogniser(drawn), o.norm(dim=1))
            loss = loss + stage.adversarial_weight * adversarial + stage.identity_weight * identity
            row |= {"adversarial": adversarial.item(), "identity": identity.item()}
        _descend(optimizers["generator"], loss)
        real, made = critic(wanted), critic(drawn.detach())
        judged = lsgan_loss(real, 1.0) + lsgan_loss(made, 0.0)
        _descend(optimizers["discriminator"], judged)
        return row | {"discriminator": judged.item()}

    with evaluating(recogniser), _frozen(recogniser):
        history = run_steps(
            folder,
            {
                "config": {
                    "seed": config.seed,
                    "domain": domain,
                    "recogniser": asdict(config.recogniser),
                    "generator": asdict(config.generator),
                    "discriminator": asdict(config.discriminator),
                    "style": asdict(stage),
                },
                "data": _prints(people),
            },
            {"generator": painter, "discriminator": critic},
            optimizers,
            step,
            stage.steps,
            checkpoint_every=stage.checkpoint_every,
            **options,
        )
    return painter.eval().requires_grad_(False), history


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for a module's parameters, for a while."""
    learned = [p for p in module.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


def _some(images: Tensor, count: int, random: torch.Generator) -> Tensor:
    return images[torch.randint(len(images), (count,), generator=random, device="cpu")]


def _set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _prints(people: People) -> dict[str, str]:
    return {f.name: fingerprint(getattr(people, f.name)) for f in fields(people)}


# -- what was learned ----------------------------------------------------------------------------


@torch.no_grad()
def strength_sweep(
    painter: Generator, recogniser: nn.Module, images: Tensor, strengths: Tensor, seed: int
) -> dict[str, Tensor]:
    """The mean cosine of f(X) and f(G(X, o)) as ‖o‖ grows.

    Args:
        images: (N, C, H, W) in [−1, 1]. strengths: (A,).

    Returns:
        "axes": (q, A), along each u_i; "random": (A,), along a direction of its own for each
        image, the same at every strength.
    """
    size = painter.config.styles
    directions = normals((len(images), size), draws(seed, "sweep", 0))
    directions = F.normalize(directions).to(images.device)
    with evaluating(recogniser):
        own = recogniser(images)

        def cosine(o: Tensor) -> Tensor:
            return F.cosine_similarity(own, recogniser(painter(images, o))).mean().cpu()

        axes = [
            torch.stack([cosine((a * axis).expand(len(images), -1)) for a in strengths.tolist()])
            for axis in torch.eye(size, dtype=torch.float32, device=images.device)
        ]
        random = torch.stack([cosine(a * directions) for a in strengths.tolist()])
    return {"axes": torch.stack(axes), "random": random}


@torch.no_grad()
def guided_gain(
    config: CfsmConfig,
    painter: Generator,
    recogniser: nn.Module,
    head: MarginHead,
    source: Faces,
    batches: int = 20,
) -> dict[str, Tensor]:
    """The recogniser's loss at o ~ N(0, I), at o + ε·(random signs) and at o*; (batches,) each."""
    device = check_device(config.device)
    losses: dict[str, list[Tensor]] = {"style": [], "random": [], "guided": []}
    for number in range(batches):
        random = draws(config.seed, "gain", number)
        chosen = torch.randint(
            len(source), (config.guided.batch_size,), generator=random, device="cpu"
        )
        x, y = normalize(source.images[chosen]).to(device), source.labels[chosen].to(device)
        o = normals((len(x), config.generator.styles), random)
        signs = torch.randint(2, o.shape, generator=random, device="cpu").float() * 2.0 - 1.0
        o, signs = o.to(device), signs.to(device)
        epsilon = config.guided.epsilon
        styles = {
            "style": o,
            "random": o + epsilon * signs,
            "guided": guided_styles(
                painter, recogniser, head.weight, x, y, o, head.margin, epsilon
            ),
        }
        with evaluating(recogniser):
            for name, each in styles.items():
                losses[name].append(head(recogniser(painter(x, each)), y).cpu())
    return {name: torch.stack(values) for name, values in losses.items()}


def similarities(painters: dict[str, Generator]) -> Tensor:
    """(n, n) float64: S(A, B) of every two subspaces."""
    spaces = [painter.space for painter in painters.values()]
    rows = [[subspace_similarity(a, b) for b in spaces] for a in spaces]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


# -- stage 2 -------------------------------------------------------------------------------------


def train_guided(
    config: CfsmConfig,
    people: People,
    recogniser: nn.Module,
    head: MarginHead,
    painter: Generator,
    variant: str,
    folder: Path,
    **options: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Stage 2: goes on training a copy of the recogniser; returns it in evaluation mode.

    Args:
        variant: "guided" changes all but a share of each batch to guided styles, "random" to
            styles o ~ N(0, I), "originals" leaves all as they are. Images, labels and o are drawn
            alike in all three.
        options: of `run_steps`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    stage, device = config.guided, check_device(config.device)
    network, centers = deepcopy(recogniser).to(device), deepcopy(head).to(device)
    learned = [*network.parameters(), *centers.parameters()]
    learned = [p for p in learned if p.requires_grad]
    optimizer = torch.optim.SGD(learned, stage.lr, 0.9, nesterov=True)
    augment = Augment(config.recogniser.augment)
    kept = round(stage.originals * stage.batch_size)

    def step(number: int) -> dict[str, float]:
        _set_lr(optimizer, stage.lr, number, stage.steps)
        random = draws(config.seed, "guided", number)
        chosen = torch.randint(
            len(people.source), (stage.batch_size,), generator=random, device="cpu"
        )
        x = augment(people.source.images[chosen], random).to(device)
        y = people.source.labels[chosen].to(device)
        o = normals((len(x) - kept, config.generator.styles), random).to(device)
        if variant != "originals" and len(o):
            if variant == "guided":
                o = guided_styles(
                    painter,
                    network,
                    centers.weight,
                    x[kept:],
                    y[kept:],
                    o,
                    centers.margin,
                    stage.epsilon,
                )
            with torch.no_grad():
                x[kept:] = painter(x[kept:], o)
        with seeded(seeds(config.seed, "guided dropout", number), device):
            loss, stats = centers(network(x), y, return_stats=True)
        _descend(optimizer, loss)
        return {"loss": loss.item(), "accuracy": stats.top1.float().mean().item()}

    network.train()
    history = run_steps(
        folder,
        {
            "config": {
                "variant": variant,
                "recipe": asdict(config)  # what came before decides what comes out
                | {"guided": asdict(stage), "domains": [stage.domain]},
            },
            "data": _prints(people),
        },
        {"backbone": network, "head": centers},
        {"sgd": optimizer},
        step,
        stage.steps,
        checkpoint_every=stage.checkpoint_every,
        **options,
    )
    return network.eval(), history


# -- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Results:
    """What the recipe found, for the report.

    Attributes:
        style_log: by domain, the rows of stage 1. sweep: by domain, see `strength_sweep`.
        strengths: (A,). similarity: (n, n). gain: see `guided_gain`.
        guided_log, verification: by variant; the latter then by domain, with "clean" first.
    """

    config: CfsmConfig
    people: People
    painters: dict[str, Generator]
    style_log: dict[str, list[dict[str, float]]]
    strengths: Tensor
    sweep: dict[str, dict[str, Tensor]]
    similarity: Tensor
    gain: dict[str, Tensor]
    guided_log: dict[str, list[dict[str, float]]]
    verification: dict[str, dict[str, Any]]


def run(
    config: CfsmConfig,
    output: Path,
    *,
    resume: bool = False,
    progress: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> Results:
    """Trains everything below ``output`` and measures it.

    Args:
        resume: go on with what is there; the result is bitwise that of an uninterrupted run.
        progress: a bar for each part, from its description.

    Raises:
        FileExistsError, CheckpointError, FloatingPointError, KeyboardInterrupt,
            Terminated: see `run_steps`.
    """
    bar = progress or (lambda description: nullcontext())
    device = check_device(config.device)
    _check_networks(config)
    people = read_people(config.data, config.seed)
    folder = output / "recogniser"
    with bar("recogniser") as shown:
        trained = train(
            config.recogniser,
            people.source,
            folder,
            resume=resume and (folder / CONFIG).exists(),
            progress=shown,
        )
    assert isinstance(trained.head, MarginHead)  # this is one process
    recogniser, head = trained.backbone.to(device).eval(), trained.head.to(device)

    painters: dict[str, Generator] = {}
    style_log = {}
    for domain in config.domains:
        with bar(f"style: {domain}") as shown:
            painters[domain], style_log[domain] = learn_style(
                config,
                people,
                recogniser,
                domain,
                output / "style" / domain,
                resume=resume,
                progress=shown,
            )
    faces = first_images(people.held, 64).to(device)
    strengths = torch.linspace(0.0, 6.0, 13, dtype=torch.float32, device="cpu")
    sweep = {}
    with bar("strength sweep") as shown:
        if shown:
            shown.start(len(painters), 0)
        for domain, painter in painters.items():
            sweep[domain] = strength_sweep(painter, recogniser, faces, strengths, config.seed)
            if shown:
                shown.advance(domain)
    painter = painters[config.guided.domain]
    gain = guided_gain(config, painter, recogniser, head, people.source)

    guided_log, verification = {}, {"before": _verify(config, recogniser, people.held)}
    for variant in VARIANTS:
        with bar(f"guided: {variant}") as shown:
            network, guided_log[variant] = train_guided(
                config,
                people,
                recogniser,
                head,
                painter,
                variant,
                output / "guided" / variant,
                resume=resume,
                progress=shown,
            )
        verification[variant] = _verify(config, network, people.held)
    return Results(
        config,
        people,
        painters,
        style_log,
        strengths,
        sweep,
        similarities(painters),
        gain,
        guided_log,
        verification,
    )


def _check_networks(config: CfsmConfig) -> None:
    """Raises ValueError unless all networks take the images; without memory for any of it."""
    size = config.data.size
    check_network(config.recogniser, (size, size, 1))
    with standard_defaults(), torch.device("meta"):
        make = partial(torch.empty, dtype=torch.float32, device="meta")
        image, style = make(1, 1, size, size), make(1, config.generator.styles)
        Generator(config.generator)(image, style)
        Discriminator(config.discriminator)(image)


def _verify(config: CfsmConfig, network: nn.Module, held: Faces) -> dict[str, Any]:
    sets = {"clean": held} | {d: degraded(held, d, config.seed) for d in config.domains}
    return {name: verify(embed(network, each.images), each.labels) for name, each in sets.items()}
