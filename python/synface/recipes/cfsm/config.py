"""Configuration of the CFSM recipe; cfsm.toml has the defaults and describes each key."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...common.check import check_integers, check_number
from ...common.config import load_recipe
from ...common.toml import toml_text
from ...training.config import TrainConfig
from ..generated import EMBEDDED, check_choices
from ..loop import EARLIER
from .degrade import DOMAINS
from .model import EPSILON, ORTHOGONALITY, DiscriminatorConfig, GeneratorConfig

FIDELITIES = ("paper", "extended")
# What differs from the paper's losses and networks: the keys, with the paper's values.
ADDITIONS: dict[str, dict[str, Any]] = {
    "generator": {"noise": False, "blend": False, "light": 0, "awake": 0.0},
    "discriminator": {"residuals": False},
    "style": {"adversarial_weight": 1.0, "recovery_weight": 0.0, "statistics_weight": 0.0},
}

ALL = "all"  # in place of an addition: all of them
# Keys that checkpoints of version 0.1 lack, with the values that they stand for.
ADDED: dict[str, dict[str, Any]] = {
    **ADDITIONS,
    "style": {"seeds": 1, "recovery_weight": 0.0, "statistics_weight": 0.0},
    "guided": {"seeds": 1, "other_originals": [], "other_epsilons": []},
    "data": {"identities": 250, "channels": 1},
    "recipe": {"fidelity": "extended", "space": 0},
}


@dataclass(frozen=True)
class DataConfig:
    """The faces for training, target domains and verification; see cfsm.toml.

    Attributes:
        identities, channels: number of generated people, and channels of their images.
    """

    faces: str = EMBEDDED
    identities: int = 250
    channels: int = 1
    target: str = EMBEDDED
    size: int = 112
    images_per_identity: int = 12
    target_identities: int = 20
    held_out_identities: int = 25

    def __post_init__(self) -> None:
        check_integers(self, size=16, images_per_identity=2, held_out_identities=2)
        check_integers(self, identities=2)
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels!r}")
        check_integers(self, target_identities=1 if self.target == EMBEDDED else 0)


@dataclass(frozen=True)
class StyleConfig:
    """Stage 1: the loss is Σ weight·L, over all names with a weight.

    The recovery and statistics losses are not in the paper.

    Attributes:
        seeds: number of style spaces of the guided domain, each with its own seed.
        lr: learning rate of Adam(0.5, 0.999), with cosine decay to 0.
        orthogonality: the kind of `orthogonality_loss`.
    """

    seeds: int = 1
    steps: int = 100_000
    batch_size: int = 64
    lr: float = 1e-4
    orthogonality: str = "l1"
    adversarial_weight: float = 1.0
    orthogonality_weight: float = 1.0
    identity_weight: float = 8.0
    anchor_weight: float = 1.0
    recovery_weight: float = 0.0
    statistics_weight: float = 0.0
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        _check_steps(self)
        for name in (f.name for f in fields(self) if f.name.endswith("_weight")):
            check_number(name, getattr(self, name), 0.0)
        if self.orthogonality not in ORTHOGONALITY:
            raise ValueError(
                f"orthogonality must be one of {ORTHOGONALITY}, got {self.orthogonality!r}"
            )
        if self.statistics_weight and self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2 with a statistics_weight, got {self.batch_size}"
            )


@dataclass(frozen=True)
class GuidedConfig:
    """Stage 2: training on original images and on images redrawn in other styles.

    Attributes:
        domain: the target domain whose styles are used.
        seeds: number of paired seeds, each with its own recognizer.
        lr: learning rate of SGD with momentum 0.9, with cosine decay to 0.
        originals: share of each batch that is not redrawn. epsilon: ε.
        other_originals, other_epsilons: further ones to compare.
    """

    domain: str = "mixed"
    seeds: int = 1
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 0.02
    originals: float = 0.75
    other_originals: tuple[float, ...] = ()
    epsilon: float = EPSILON
    other_epsilons: tuple[float, ...] = ()
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        _check_steps(self)
        check_number("originals", self.originals, 0.0, 1.0)
        check_number("epsilon", self.epsilon, 0.0)
        for share in self.other_originals:
            check_number("each of other_originals", share, 0.0, 1.0)
        for epsilon in self.other_epsilons:
            check_number("each of other_epsilons", epsilon, 0.0)
        shares = (self.originals, *self.other_originals)
        if len({round(share * self.batch_size) for share in shares}) < len(shares):
            raise ValueError(
                "originals and other_originals must be different numbers of originals in a batch "
                f"of {self.batch_size}, got {shares}"
            )
        epsilons = (self.epsilon, *self.other_epsilons)
        if len({f"{epsilon:g}" for epsilon in epsilons}) < len(epsilons):
            raise ValueError(f"epsilon and other_epsilons must be different, got {epsilons}")


def _check_steps(stage: StyleConfig | GuidedConfig) -> None:
    check_integers(stage, steps=1, batch_size=1, checkpoint_every=1, seeds=1)
    check_number("lr", stage.lr, 0.0)


@dataclass(frozen=True)
class CfsmConfig:
    """Configuration of the whole recipe; the defaults are the paper's sizes.

    Attributes:
        fidelity: "extended": as configured; "paper": without this library's additions, whose keys
            then have the paper's values, see `ADDITIONS`.
    """

    fidelity: str = "extended"
    seed: int = 0
    device: str = "cpu"
    domains: tuple[str, ...] = ("mixed",)
    data: DataConfig = field(default_factory=DataConfig)
    recognizer: TrainConfig = field(default_factory=TrainConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    style: StyleConfig = field(default_factory=StyleConfig)
    guided: GuidedConfig = field(default_factory=GuidedConfig)

    def __post_init__(self) -> None:
        check_integers(self, seed=0)
        if self.fidelity not in FIDELITIES:
            raise ValueError(f"fidelity must be one of {FIDELITIES}, got {self.fidelity!r}")
        if self.fidelity == "paper":
            for table, keys in ADDITIONS.items():
                changed = replace(getattr(self, table), **keys)
                object.__setattr__(self, table, changed)  # frozen
        check_choices("domains", self.domains, DOMAINS)
        if self.guided.domain not in self.domains:
            raise ValueError(
                f"guided.domain must be one of domains, {list(self.domains)}, "
                f"got {self.guided.domain!r}"
            )


def alone(config: CfsmConfig) -> CfsmConfig:
    """Return the configuration without its other seeds and rows, on which no part depends."""
    style = replace(config.style, seeds=1)
    guided = replace(config.guided, seeds=1, other_originals=(), other_epsilons=())
    return replace(config, style=style, guided=guided)


def additions(config: CfsmConfig) -> list[str]:
    """Return the keys of the additions that a configuration uses."""
    return [
        key
        for table, keys in ADDITIONS.items()
        for key, off in keys.items()
        if getattr(getattr(config, table), key) != off
    ]


def without(config: CfsmConfig, addition: str) -> CfsmConfig:
    """Return the configuration with the paper's value of an addition, or of `ALL`."""
    if addition == ALL:
        return replace(config, fidelity="paper")
    table, value = _paper(addition)
    return replace(config, **{table: replace(getattr(config, table), **{addition: value})})


def described(addition: str) -> str:
    """Return the setting that leaves an addition out, or `ALL`, in TOML."""
    key, value = ("fidelity", "paper") if addition == ALL else (addition, _paper(addition)[1])
    return toml_text({key: value}).strip()


def _paper(addition: str) -> tuple[str, Any]:
    """Return the table of an addition, and the paper's value."""
    ((table, value),) = ((t, keys[addition]) for t, keys in ADDITIONS.items() if addition in keys)
    return table, value


def load_config(file: Path | None = None, *, quick: bool = False) -> CfsmConfig:
    """Return a configuration from TOML, by default cfsm.toml; see `load_recipe`."""
    return load_recipe(CfsmConfig, Path(__file__).with_name("cfsm.toml"), file, quick, EARLIER)
