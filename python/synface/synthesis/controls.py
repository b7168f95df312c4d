"""Named controls of face generators: which columns of a style change pose, light and so on.

The contract is that of DiscoFaceGAN, whose generator takes λ = [α, β, γ, θ, ε]: identity,
expression, light, pose and the rest. Identity mixup acts on α alone, which is the embedding here;
the other columns are the style, by name.

Source: Deng et al., "Disentangled and Controllable Face Image Generation via 3D
    Imitative-Contrastive Learning", CVPR 2020.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.check import check_integer, check_number
from .interface import FaceGenerator, check_arguments

IDENTITY = "identity"
MAX_COLUMNS = 1_000_000
Columns = Mapping[str, tuple[int, int]]  # by name: the first column, and the one after the last


def controls_of(generator: FaceGenerator) -> Mapping[str, Sequence[int]]:
    """Return the columns of a generator's style by control; empty for one that names none."""
    controls: Mapping[str, Sequence[int]] = getattr(generator, "controls", {})
    return controls


def neutral_of(generator: FaceGenerator) -> Tensor:
    """Return the style (S,) float32 in which a generator varies nothing."""
    neutral = getattr(generator, "neutral", None)
    if neutral is None:
        return torch.zeros(generator.style_size, dtype=torch.float32, device="cpu")
    return torch.as_tensor(neutral, dtype=torch.float32, device="cpu")


def check_controls(name: str, chosen: Sequence[str], generator: FaceGenerator) -> None:
    """Raise ValueError unless a generator has all of the chosen controls."""
    known = controls_of(generator)
    lacking = [control for control in chosen if control not in known]
    if lacking:
        kind = generator.description.get("kind", type(generator).__name__)
        expected = ", ".join(known) if known else "none: say which columns are which (columns=)"
        raise ValueError(f"{name}: {kind} has no control {lacking[0]!r}; it has {expected}")


class Vary:
    """A face generator that varies some controls of another one, and holds the others neutral.

    Args:
        generator: the face generator, with `controls`.
        controls: the controls to vary; or by name the strength of each: the factor of its numbers'
            distance from neutral.

    Raises:
        TypeError: for a strength that is no number.
        ValueError: for a control that the generator lacks, and a strength that is negative or not
            finite.

    Memory: two copies of a batch's styles beside what the generator takes.
    """

    def __init__(
        self, generator: FaceGenerator, controls: Sequence[str] | Mapping[str, float]
    ) -> None:
        if isinstance(controls, str):
            raise ValueError(f"controls must be a sequence of names or a mapping, got {controls!r}")
        check_controls("controls", list(controls), generator)
        strengths = (
            dict(controls) if isinstance(controls, Mapping) else dict.fromkeys(controls, 1.0)
        )
        for name, strength in strengths.items():
            check_number(f"strength of {name}", strength, 0.0)
        self.generator, self.strengths = generator, strengths
        self.embedding_size, self.style_size = generator.embedding_size, generator.style_size
        self.image_shape = generator.image_shape
        self.neutral = neutral_of(generator)
        self.controls = {name: controls_of(generator)[name] for name in strengths}
        self.numbers = getattr(generator, "numbers", {})
        outer = generator.description.get("varied")
        self.description = generator.description | {
            "varied": strengths if outer is None else [outer, strengths]
        }
        self._factor = torch.zeros(generator.style_size, dtype=torch.float32, device="cpu")
        for name, strength in strengths.items():
            self._factor[list(self.controls[name])] = strength

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        check_arguments(self, embedding, style, seed)
        style = style.cpu()
        scaled = self.neutral + self._factor * (style - self.neutral)
        varied = torch.where(self._factor == 1, style, scaled)  # the same bits at strength 1
        return self.generator.generate(embedding, varied, seed)


def parse_columns(text: str) -> Columns:
    """Return columns from text such as "identity=0:160, expression=160:224".

    Raises:
        ValueError: for another form, or a name that is given twice.
    """
    found: dict[str, tuple[int, int]] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w ]*\w)\s*=\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", part)
        if match is None:
            raise ValueError(
                f"columns must read NAME=FIRST:END, separated by commas "
                f"(identity=0:160, expression=160:224), got {part.strip()!r}"
            )
        if match[1] in found:
            raise ValueError(f"columns name {match[1]!r} twice")
        found[match[1]] = (int(match[2]), int(match[3]))
    return found


def check_columns(columns: Any) -> Columns:
    """Return columns by name, in their order.

    Raises:
        ValueError: unless each name has a column, and they follow each other without gap or
            overlap, from 0 to at most a million.
    """
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"columns must map names to (first, end), got {columns!r}")
    spans: dict[str, tuple[int, int]] = {}
    for name, span in columns.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"columns must have names that are not empty, got {name!r}")
        if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 2:
            raise ValueError(f"columns of {name} must be (first, end), got {span!r}")
        for end in span:
            check_integer(f"columns of {name}", end, 0)
        spans[name] = (span[0], span[1])
    expected, before, found = 0, "", {}
    for name, (first, end) in sorted(spans.items(), key=lambda item: item[1]):
        if end <= first:
            raise ValueError(
                f"columns of {name} must be FIRST:END with FIRST < END, got {first}:{end}"
            )
        if first < expected:
            raise ValueError(
                f"columns of {before} and {name} overlap at {first}: each belongs to one control"
            )
        if first > expected:
            raise ValueError(f"columns {expected}:{first} belong to no control: name them")
        expected, before, found[name] = end, name, (first, end)
    if expected > MAX_COLUMNS:
        raise ValueError(f"columns must end at {MAX_COLUMNS:,} at most, got {expected:,}")
    if list(found) == [IDENTITY]:
        raise ValueError(f"columns must name others than {IDENTITY}'s: those of the style")
    return found


def count_columns(columns: Columns) -> int:
    """Return how many columns there are."""
    return max(end for _, end in columns.values())


def style_controls(columns: Columns) -> dict[str, tuple[int, ...]]:
    """Return the columns of the style by control, where identity's are taken out of λ."""
    start, end = columns.get(IDENTITY, (0, 0))

    def place(column: int) -> int:
        return column if column < start else column - (end - start)

    return {
        name: tuple(map(place, range(*span))) for name, span in columns.items() if name != IDENTITY
    }


def latent(columns: Columns, embedding: Tensor, style: Tensor) -> Tensor:
    """Return λ (B, L) of unit embeddings (B, D) and styles (B, S).

    The embedding is scaled by √D, so that random ones have standard normal numbers, as styles do.
    """
    start, _ = columns[IDENTITY]
    scaled = embedding * math.sqrt(embedding.shape[1])
    return torch.cat([style[:, :start], scaled, style[:, start:]], 1)


def describe_columns(columns: Columns | None) -> dict[str, Any]:
    """Return what identifies columns, for a generator's description."""
    return {} if columns is None else {"columns": {n: list(span) for n, span in columns.items()}}
