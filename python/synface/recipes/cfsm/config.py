"""Configuration of the CFSM recipe; cfsm.toml has the defaults and describes each key."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from ...common.check import check_integers, check_number
from ...common.config import load
from ...training.config import TrainConfig
from ..generated import EMBEDDED, check_choices
from ..loop import EARLIER
from .degrade import DOMAINS
from .model import EPSILON, ORTHOGONALITY, DiscriminatorConfig, GeneratorConfig


@dataclass(frozen=True)
class DataConfig:
    """The faces for training, target domains and verification."""

    faces: str = EMBEDDED
    target: str = EMBEDDED
    size: int = 112
    images_per_identity: int = 12
    target_identities: int = 20
    held_out_identities: int = 25

    def __post_init__(self) -> None:
        check_integers(self, size=16, images_per_identity=2, held_out_identities=2)
        check_integers(self, target_identities=1 if self.target == EMBEDDED else 0)


@dataclass(frozen=True)
class StyleConfig:
    """Stage 1: the loss is Σ weight·L, over adversarial, orthogonality, identity and anchor.

    Attributes:
        lr: learning rate of Adam(0.5, 0.999), with cosine decay to 0.
        orthogonality: the kind of `orthogonality_loss`.
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
        _check_steps(self)
        for name in (f.name for f in fields(self) if f.name.endswith("_weight")):
            check_number(name, getattr(self, name), 0.0)
        if self.orthogonality not in ORTHOGONALITY:
            raise ValueError(
                f"orthogonality must be one of {ORTHOGONALITY}, got {self.orthogonality!r}"
            )


@dataclass(frozen=True)
class GuidedConfig:
    """Stage 2: training on original images and on images redrawn in other styles.

    Attributes:
        domain: the target domain whose styles are used.
        lr: learning rate of SGD with momentum 0.9, with cosine decay to 0.
        originals: share of each batch that is not redrawn. epsilon: ε.
    """

    domain: str = "mixed"
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 0.02
    originals: float = 0.75
    epsilon: float = EPSILON
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        _check_steps(self)
        check_number("originals", self.originals, 0.0, 1.0)
        check_number("epsilon", self.epsilon, 0.0)


def _check_steps(stage: StyleConfig | GuidedConfig) -> None:
    check_integers(stage, steps=1, batch_size=1, checkpoint_every=1)
    check_number("lr", stage.lr, 0.0)


@dataclass(frozen=True)
class CfsmConfig:
    """Configuration of the whole recipe; the defaults are the paper's sizes."""

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
        check_choices("domains", self.domains, DOMAINS)
        if self.guided.domain not in self.domains:
            raise ValueError(
                f"guided.domain must be one of domains, {list(self.domains)}, "
                f"got {self.guided.domain!r}"
            )


def load_config(file: Path | None = None) -> CfsmConfig:
    """Return a configuration from TOML, by default cfsm.toml; raises as `load`."""
    return load(CfsmConfig, file or Path(__file__).with_name("cfsm.toml"), EARLIER)
