"""Configuration of a training run; importing it does not import torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import synface_kernels as sk

from ..common.imported import SPEC
from ..models import PRESETS, SHORT

# Keys added later; older configurations use the defaults.
LATER = {
    "accumulate",
    "precision",
    "power",
    "clip_norm",
    "freeze_statistics",
    "sample_rate",
    "fused_update",
    "backbone",
    "freeze",
    "lr_factors",
}
PRECISIONS = ("float32", "bfloat16", "float16")  # torch's names
BUILT_IN = ("iresnet", *PRESETS)  # backbones that are built without the user's code
PARTS = ("backbone", "head")  # of the model, whose parameters are trained
MODULE = "module"  # the backbone of a run whose module was passed to `train`
# A requirement as text and as a predicate, which NaN fails.
Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("be positive", lambda value: value > 0)
NOT_NEGATIVE: Rule = ("not be negative", lambda value: value >= 0)


def one_of(*names: str) -> Rule:
    """Return the rule that a value is one of some names."""
    return f"be one of {names}", lambda value: value in names


def option(
    default: Any,
    help: str,
    must: Rule | None = None,
    *,
    least: float | None = None,
    most: float | None = None,
    **settings: Any,
) -> Any:
    """Return a dataclass field that is an option of the command line too.

    Args:
        default: of both.
        help: what the value is, for people who read the code or ``--help``.
        must: what `check_fields` raises ValueError for.
        least, most: bounds that the command line checks; `NOT_NEGATIVE` has its own.
        **settings: further arguments of `dataclasses.field`; ``type`` is the option's type, where
            that is not the field's.
    """
    metadata = {"help": help, "must": must, "type": settings.pop("type", None)}
    metadata |= {"least": 0 if must is NOT_NEGATIVE else least, "most": most}
    return field(default=default, metadata=metadata, **settings)


def check_fields(config: Any) -> None:
    """Raise ValueError for the first field of a dataclass whose value breaks its rule."""
    for each in fields(config):
        rule, value = each.metadata["must"], getattr(config, each.name)
        if rule is not None and not rule[1](value):
            raise ValueError(f"{each.name} must {rule[0]}, got {value!r}")


def factors_of(text: str) -> dict[str, float]:
    """Return the factors of the learning rate by the names of parts of the model.

    Raises:
        ValueError: for another syntax, an unknown part, a name that is given twice, or a factor
            that is negative or not finite.
    """
    factors: dict[str, float] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, value = (each.strip() for each in part.partition("="))
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        known = name.split(".")[0] in PARTS and name not in factors
        if not known or not 0 <= factor < math.inf:
            raise ValueError(
                "lr_factors must be name=factor, separated by commas, each name once and "
                f"beginning with {' or '.join(PARTS)}, each factor 0 or more, got {part!r} in "
                f"{text!r}"
            )
        factors[name] = factor
    return factors


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run. Two runs of one configuration on one machine are bitwise equal.

    Each field is an option of `synface train` and a key of its ``--config`` file; its help
    describes it.
    """

    epochs: int = option(40, "Passes over the training images.", POSITIVE)
    batch_size: int = option(32, "Images per step, over all ranks.", POSITIVE)
    accumulate: int = option(
        1,
        "Number of micro-batches per step, whose gradients are accumulated; each has its own "
        "batch statistics.",
    )
    precision: str = option(
        "float32",
        "Autocast dtype of backbone and head: float32, bfloat16, or float16 with a scaled loss.",
        one_of(*PRECISIONS),
    )
    optimizer: str = option(
        "sgd", "Optimizer: sgd (Nesterov momentum 0.9) or adamw.", one_of("sgd", "adamw")
    )
    lr: float = option(0.2, "Learning rate after the warm-up.", POSITIVE)
    lr_factors: str = option(
        "",
        "Factors of the learning rate by parts of the model, such as "
        "head=1,backbone=0.1,backbone.stem=0: the longest name that a parameter's begins with "
        "counts.",
        kw_only=True,
    )
    freeze: float = option(
        0.0,
        "Epochs at the start in which the backbone is frozen and the head trains alone.",
        NOT_NEGATIVE,
        kw_only=True,
    )
    weight_decay: float = option(1e-3, "Weight decay.", NOT_NEGATIVE)
    schedule: str = option(
        "cosine",
        "Learning rate schedule: cosine, polynomial, step (divided by 10 after 60 % and 85 % of "
        "the steps) or constant.",
        one_of("cosine", "polynomial", "step", "constant"),
    )
    power: float = option(2.0, "Exponent of the polynomial schedule.", POSITIVE)
    warmup_epochs: float = option(2.0, "Epochs of linear warm-up.", NOT_NEGATIVE)
    clip_norm: float = option(
        0.0, "Maximum norm of the backbone's gradient; 0 for no clipping.", NOT_NEGATIVE
    )
    freeze_statistics: bool = option(
        False, "Normalize by running statistics instead of the batch's."
    )
    sample_rate: float = option(
        1.0,
        "Share of the classes sampled in a step (Partial FC); below 1, the centers have a row "
        "optimizer.",
        ("be in (0, 1]", lambda value: 0 < value <= 1),
    )
    fused_update: bool = option(
        False, "Apply the centers' optimizer inside the backward pass, storing no gradient."
    )
    scale: float = option(32.0, "Logit scale.")
    m1: float = option(1.0, "Factor of the angle in the margin.")
    m2: float = option(0.3, "Radians that the margin adds to the angle.")
    m3: float = option(0.0, "Cosine that the margin subtracts.")
    backbone: str = option(
        "iresnet",
        f"Backbone: iresnet with the given widths and depths, {', '.join(PRESETS)} (or "
        f"{', '.join(SHORT)}), or a function as package.module:function, which is called with "
        "image_size=(H, W), channels and embedding_size; synface.models.timm:NAME is a network of "
        "timm.",
        (
            f"be one of {', '.join((*BUILT_IN, *SHORT))} or a package.module:function",
            lambda value: value in (*BUILT_IN, *SHORT, MODULE) or bool(SPEC.fullmatch(value)),
        ),
        kw_only=True,
    )
    widths: tuple[int, ...] = option((16, 32, 64, 128), "Channels of each stage of iresnet.")
    depths: tuple[int, ...] = option((1, 1, 1, 1), "Residual blocks of each stage of iresnet.")
    embedding_size: int = option(128, "Dimension of the embeddings.", POSITIVE)
    dropout: float = option(
        0.2,
        "Dropout probability before the last layer of an iresnet.",
        ("be in [0, 1)", lambda value: 0 <= value < 1),
    )
    augment: float = option(1.0, "Augmentation strength in [0, 2]; 0 for none.", NOT_NEGATIVE)
    checkpoint_every: float = option(
        5,
        "Epochs between checkpoints; 0.1 is a tenth of one.",
        ("be positive and finite", lambda value: 0 < value < math.inf),
    )
    seed: int = option(0, "Random seed.", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "backbone", SHORT.get(self.backbone, self.backbone))
        factors_of(self.lr_factors)
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(
                f"accumulate must be in [1, batch_size = {self.batch_size}], got {self.accumulate}"
            )
        if self.fused_update and self.accumulate > 1:
            raise ValueError(
                "fused_update steps the centers after each micro-batch: accumulate must be 1, "
                f"got {self.accumulate}"
            )
        from ..data import Augment

        self.margin()
        Augment(self.augment)

    def margin(self) -> sk.CombinedMargin:
        """Return the margin of the head."""
        return sk.CombinedMargin(self.scale, self.m1, self.m2, self.m3)

    def to_json(self) -> dict[str, Any]:
        """Return all fields in JSON types, for files, without some defaults.

        Without those keys, records compare equal to those of older versions.
        """
        values = json.loads(json.dumps(asdict(self)))
        omitted = {"backbone", "freeze", "lr_factors"}
        defaults = {each.name: each.default for each in fields(self) if each.name in omitted}
        return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        """Return the configuration that a file records.

        Raises:
            CheckpointError: for keys that are unknown or missing.
            TypeError, ValueError: for an invalid value.
        """
        from ..common.files import CheckpointError

        known = {f.name for f in fields(TrainConfig)}
        different = sorted((values.keys() ^ known) - (LATER - values.keys()))
        if different:
            raise CheckpointError(
                f"a configuration with unknown or missing keys: {different}; it was "
                "written by another version of synface: use that version"
            )
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return TrainConfig(**lists)
