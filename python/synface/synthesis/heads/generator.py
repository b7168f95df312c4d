"""Face generator that draws a 3D head: from embeddings and styles to images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.check import check_device, check_integer, check_memory
from ...common.rng import normals
from ...data.embedded import to_bytes
from ..interface import check_arguments, check_size
from .exact import bell, exponential, on_grid, ramp, step
from .geometry import EXPRESSIONS, EYE_X, EYE_Y, SHAPES, surface
from .materials import DETAILS, LOOKS, Masks, brow_height, detail, masks
from .render import Place, Rasterizer, Turn, blurred, exposure, halve, shading

# The numbers of a style, by control.
NUMBERS = {
    "expression": (*EXPRESSIONS, "eyelids"),
    "pose": ("yaw", "pitch", "roll"),
    "light": ("azimuth", "elevation", "ambient share", "gain"),
    "placement": ("zoom", "right", "down"),
    "background": ("brightness", "slope", "hue"),
    "sensor": ("blur", "noise"),
}
CONTROLS = {
    name: tuple(range(start := sum(map(len, list(NUMBERS.values())[:i])), start + len(numbers)))
    for i, (name, numbers) in enumerate(NUMBERS.items())
}
LUMA = (0.299, 0.587, 0.114)
YAW, PITCH, ROLL = 0.42, 0.20, 0.10  # standard deviations, in radians
LARGEST = 2.5  # of an identity's numbers, in standard deviations
ZOOM = 0.47  # half the head's height, in sides of the image


class HeadGenerator:
    """Face generator that draws a procedural 3D head, with named controls; needs no file.

    A unit embedding e sets 91 numbers, sqrt(D) * (Q e)_k, each of unit variance for a random e:
    16 of the head's shape, 15 looks (skin, hair, brows, beard, glasses, ...) and 60 principal
    components of the fine detail of scikit-image's 100 LFW crops. Q is always the same; its rows
    are orthonormal where D allows it, else unit.

    The 21 numbers of a style, standard normal, belong to `controls`: expression, pose, light,
    placement, background and sensor. At 0 each is neutral: a face at rest, seen from the front, in
    even light, without blur or noise. In terms of DiscoFaceGAN's λ = [α, β, γ, θ, ε], the embedding
    is α, expression β, light γ, pose θ, and the rest ε.

    Identity numbers beyond ±2.5 and styles beyond ±6 count as these. The same arguments give the
    same bits in any batch and on any number of threads: pixels are computed with correctly rounded
    arithmetic, see `heads.exact`.

    Args:
        embedding_size: D, at least 2.
        size: height and width in pixels, at least 8.
        channels: 1 (grayscale) or 3 (RGB).
        device: the device that draws; images are returned on the CPU.

    Attributes:
        controls: by name, the columns of the style. numbers: by control, names of its columns.

    Raises:
        TypeError, ValueError: for an argument of another type, or out of range.
        DataError: if scikit-image's file is missing or not as expected.

    Memory: 13 KB * size^2, three times as much while it is made, and 4 KB * size^2 for each of up
        to 8 images that are drawn at once (64 on a GPU).

    Source: Deng et al., "Disentangled and Controllable Face Image Generation via 3D
        Imitative-Contrastive Learning", CVPR 2020, for the controls.
    """

    def __init__(
        self, embedding_size: int, size: int = 48, channels: int = 1, device: str = "cpu"
    ) -> None:
        check_integer("embedding_size", embedding_size, 2)
        check_size(size)
        if channels not in (1, 3) or isinstance(channels, bool):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        check_memory(f"a head of {size}x{size} pixels", 40_000 * size * size)
        self._device = check_device(device)
        self.embedding_size, self.image_shape = embedding_size, (size, size, channels)
        self.controls: Mapping[str, tuple[int, ...]] = CONTROLS
        self.numbers: Mapping[str, tuple[str, ...]] = NUMBERS
        self.style_size = sum(map(len, NUMBERS.values()))
        self.description: dict[str, Any] = {
            "kind": "heads",
            "embedding_size": embedding_size,
            "size": size,
            "channels": channels,
            "version": 1,
        }
        shape, to = surface(2 * size), self._device  # drawn at twice the size, then halved
        self._mean, self._neck = shape.mean.to(to), shape.neck.to(to)
        self._basis = shape.basis.to(to)
        self._masks = masks(shape).to(to)
        head = shape.rows * shape.columns
        self._height, self._angle = shape.v[:head].to(to), shape.t[:head].to(to)
        sideways = torch.sign(shape.x[:head].double())
        angle = shape.t[:head].double()
        self._outward = [
            on_grid(each).float().to(to)
            for each in (
                sideways * torch.sin(angle),
                -ramp(-shape.v[:head].double(), 0.2, 0.9),
                torch.cos(angle),
            )
        ]
        found = detail(shape)
        self._detail_mean, self._detail = found.mean.to(to), found.components.to(to)
        self._corners, self._weights = found.corners.to(to), found.weights.to(to)
        self._rasterizer = Rasterizer(shape, 2 * size, to)
        self._rotation = _rotation(embedding_size, len(SHAPES) + len(LOOKS) + DETAILS)
        at_once = 64 if to.type == "cuda" else 8
        self._batch = max(1, min(at_once, 64 * 64 * at_once // size**2))

    @torch.no_grad()
    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return images as `FaceGenerator.generate` does."""
        check_arguments(self, embedding, style, seed)
        height, width, channels = self.image_shape
        check_memory(f"{len(seed)} faces", len(seed) * height * width * channels)
        parts = (x.split(self._batch) for x in (embedding.cpu(), style.cpu(), seed.cpu()))
        return torch.cat([self._draw(*part) for part in zip(*parts, strict=True)])

    def _draw(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return a small batch of images."""
        identity = on_grid(embedding.double()) @ self._rotation
        identity = on_grid(identity.clamp(-LARGEST, LARGEST), 12)
        shape, look, texture = identity.split([len(SHAPES), len(LOOKS), DETAILS], 1)
        looks = dict(zip(LOOKS, look.T[:, :, None], strict=True))
        number = style.double().clamp(-6.0, 6.0).T[:, :, None]
        by = {
            control: dict(zip(NUMBERS[control], number[list(columns)], strict=True))
            for control, columns in CONTROLS.items()
        }
        expression, closed = _expression(by["expression"])

        hair = _Hair(looks, self._numbers)
        cover = hair.cover(self._height, self._angle)
        deformed = torch.cat([shape, expression], 1).to(self._device) @ self._basis
        points = self._mean + deformed.float().view(len(seed), 3, -1)
        lifted = cover * hair.thickness
        points = points + torch.stack([lifted * each for each in self._outward], 1)
        points = torch.cat([points, self._neck.expand(len(seed), -1, -1)], 2)

        pose, light, placement = by["pose"], by["light"], by["placement"]
        turn = Turn(
            self._angles(pose["yaw"] * YAW, 1.1),
            self._angles(pose["pitch"] * PITCH, 0.6),
            self._angles(pose["roll"] * ROLL, 0.4),
        )
        place = Place(
            self._numbers(ZOOM * torch.exp(0.06 * placement["zoom"])),
            self._numbers(0.025 * placement["right"]),
            self._numbers(0.025 * placement["down"]),
        )
        seen = self._rasterizer(points, turn, place)
        at = Masks(*self._masks[seen.index].movedim(-1, 0).contiguous())
        fine = self._detail_mean + (texture.to(self._device) @ self._detail).float()
        corners = self._corners[seen.index].movedim(-1, 0)
        w = self._weights[seen.index].movedim(-1, 0)
        a, b, c, d = (
            fine.gather(1, corner) * each for corner, each in zip(corners, w, strict=True)
        )
        covered = F.pad(cover, (0, self._neck.shape[1])).gather(1, seen.index)
        albedo = self._paint(at, ((a + b) + (c + d)), covered, looks, closed, expression, hair)

        azimuth, elevation = 0.75 * light["azimuth"], 0.35 * light["elevation"] - 0.35
        toward = (
            torch.sin(azimuth) * torch.cos(elevation),
            torch.sin(elevation),
            torch.cos(azimuth) * torch.cos(elevation),
        )
        ambient = self._numbers(0.35 + 0.45 * torch.special.ndtr(light["ambient share"]))
        lit = shading(seen.normal, tuple(map(self._numbers, toward)), ambient)
        gain = self._numbers(1.1 * torch.exp(0.22 * light["gain"]))
        lit = lit * gain * (1.0 - 0.35 * at.shadow)
        image = exposure(albedo * lit[:, None])
        image = torch.where(seen.hit[:, None], image, self._background(by["background"]))
        side = self._rasterizer.side
        return self._sensor(halve(image.unflatten(2, (side, side))), by["sensor"], seed)

    def _numbers(self, x: Tensor) -> Tensor:
        """Return float64 numbers, rounded so that no library's last bit shows, in float32."""
        return on_grid(x).float().to(self._device)

    def _angles(self, x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
        x = x.clamp(-largest, largest)
        return self._numbers(torch.cos(x)), self._numbers(torch.sin(x))

    def _color(self, luminance: Tensor, *chroma: float | Tensor) -> Tensor:
        """Return (B, C, 1) of a luminance (B, 1) and red, green and blue relative to each other."""
        if self.image_shape[2] == 1:
            return self._numbers(luminance)[:, None]
        rgb = [luminance * each for each in chroma]
        own = sum(share * each for share, each in zip(LUMA, rgb, strict=True))
        return self._numbers(torch.stack(rgb, 1) * (luminance / own)[:, None])

    def _paint(
        self,
        at: Masks,
        fine: Tensor,
        covered: Tensor,
        looks: Mapping[str, Tensor],
        closed: Tensor,
        expression: Tensor,
        hair: _Hair,
    ) -> Tensor:
        """Return the reflectance (B, C, P) of the visible points."""
        number, color = self._numbers, self._color
        # Skin, in logarithms: fine detail, and what is darker than the skin around it.
        lip_dark = number((0.38 + 0.16 * looks["lip color"]).clamp_min(0.05))
        brow_dark = number((0.8 + 0.35 * looks["brow darkness"]).clamp_min(0.1))
        beard = number(0.75 * torch.sigmoid(2.2 * (looks["beard"] - 0.9)))
        thickness = number(1.0 / (0.030 * torch.exp(0.22 * looks["brow thickness"])))
        brow = bell((at.v - brow_height(at.side)) * thickness) * at.brow
        # Eyes: an almond between the lids, which close it.
        opened = number((1.0 - closed).clamp(0.0, 1.3))
        wide = number(1.0 / (0.088 * torch.exp(0.10 * looks["eye size"])))
        high = number(0.036 * torch.exp(0.14 * looks["eye size"]))
        across = (at.side - EYE_X) * wide
        gap = high * (1.0 - across * across).clamp_min(0.0) * opened
        middle = EYE_Y + 0.024 * (1.0 - opened)
        below = at.v - middle
        eye = step(gap - below.abs(), 0.006) * step(1.0 - across.abs(), 0.02) * at.face
        lid = bell((below + gap) * (1 / 0.014)) * step(1.05 - across.abs(), 0.08) * at.face
        dark = lip_dark * at.lip + 0.55 * at.lip_line + 0.7 * at.nostril + beard * at.beard
        dark = dark + brow_dark * brow + 0.55 * lid + 0.25 * at.socket
        tone = torch.exp(-0.85 + 0.22 * looks["skin tone"])
        red = 0.06 * looks["skin redness"]
        skin = color(tone, 1.22 + red, 0.95 - 0.3 * red, 0.78 - 0.3 * red)
        lips = color(tone, 1.5 + red, 0.82, 0.80)
        skin = skin + (at.lip * (1.0 - covered))[:, None] * (lips - skin)
        albedo = skin * exponential(fine - dark)[:, None]

        def over(albedo: Tensor, mask: Tensor, new: Tensor) -> Tensor:
            return albedo + mask[:, None] * (new - albedo)

        one = torch.ones_like(tone)
        center = (at.side - EYE_X) * (at.side - EYE_X) + (at.v - EYE_Y) * (at.v - EYE_Y)
        iris = step(0.040 * 0.040 - center, 0.0002)
        shade = 0.10 + 0.06 * (looks["iris"] + 1.0).clamp_min(0.0)
        blue = torch.sigmoid(3.0 * (looks["iris"] - 0.5))
        albedo = over(albedo, eye, color(0.55 * one, 1.0, 0.98, 0.96))
        albedo = over(albedo, eye * iris, color(shade, 1.3 - 0.6 * blue, 0.95, 0.6 + 0.8 * blue))
        opening = number(ramp(expression[:, 1:2], 0.08, 0.3))
        teeth = number(ramp(expression[:, 1:2], 0.2, 0.5))
        albedo = over(albedo, at.cavity * opening, color(0.045 * one, 1.4, 0.8, 0.8))
        albedo = over(albedo, at.teeth * teeth, color(0.55 * one, 1.0, 0.98, 0.9))
        albedo = over(albedo, covered, hair.color(color) * (1.0 + 0.14 * at.strands[:, None]))
        rim = number(torch.sigmoid(5.0 * (looks["glasses"] - 1.1)))
        albedo = over(albedo, rim * at.glasses, color(0.07 * one, 1.0, 1.0, 1.0))
        return over(albedo, at.cloth, color(0.2 * one, 0.9, 1.0, 1.15))

    def _background(self, by: Mapping[str, Tensor]) -> Tensor:
        """Return (B, C, P): one brightness that changes evenly from left to right."""
        side = self._rasterizer.side
        uniform = torch.special.ndtr
        level = self._color(0.1 + 0.7 * uniform(by["brightness"]), *_hue(by["hue"]))
        slope = self._numbers(0.5 * (uniform(by["slope"]) - 0.5))[:, None]
        along = torch.arange(side, dtype=torch.float32, device=self._device) * (2.0 / side) - 1.0
        return (level * (1.0 + slope * along)).repeat(1, 1, side).clamp(0.0, 1.0)

    def _sensor(self, image: Tensor, by: Mapping[str, Tensor], seed: Tensor) -> Tensor:
        """Return (B, H, W, C) uint8 on the CPU, blurred and with noise."""
        strength = {
            name: self._numbers((2.0 * torch.special.ndtr(x) - 1.0).clamp_min(0.0))[
                :, :, None, None
            ]
            for name, x in by.items()
        }
        soft = blurred(image, max(1, image.shape[-1] // 24))
        image = image + strength["blur"] * (soft - image)
        noise = [normals(image.shape[1:], torch.Generator().manual_seed(s)) for s in seed.tolist()]
        image = image + strength["noise"] * torch.stack(noise).to(self._device) * 0.03
        return to_bytes(image.clamp(0.0, 1.0)).permute(0, 2, 3, 1).cpu()


class _Hair:
    """The hair of a batch: where it begins, and how far it stands off the head."""

    def __init__(self, looks: Mapping[str, Tensor], number: Any) -> None:
        line = -0.62 - 0.06 * looks["hairline"] + 0.10 * looks["fringe"].clamp_min(0.0)
        low = 0.38 * (looks["hair at the sides"] - 0.2) - 0.02
        self.line, self.low = number(line), number(low)
        self.thickness = number((0.05 + 0.035 * looks["hair volume"]).clamp_min(0.0))
        self._tone = torch.exp(-2.0 + 0.75 * looks["hair tone"]).clamp(0.03, 0.7)
        self._hue = looks["hair hue"]

    def cover(self, height: Tensor, angle: Tensor) -> Tensor:
        """Return (B, N) in [0, 1], how much of each of N points of the head is hair."""
        edge = self.line + ramp(angle, 0.65, 1.35) * (self.low - self.line).clamp_min(0.0)
        edge = edge + ramp(angle, 1.7, 2.1) * (0.45 - self.low).clamp_min(0.0)
        return step(edge - height, 0.035)

    def color(self, color: Any) -> Tensor:
        """Return (B, C, 1), between black, brown, red and blond."""
        warm = 0.25 + 0.12 * self._hue
        return color(self._tone, 1.0 + warm, 1.0, 1.0 - warm)


def _expression(by: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return amounts (B, 5) of `EXPRESSIONS` on a grid, and how far the eyes are closed, (B, 1)."""
    half = {name: 2.0 * torch.special.ndtr(x) - 1.0 for name, x in by.items()}  # in (-1, 1)
    positive = {name: x.clamp_min(0.0) for name, x in half.items()}
    amounts = (
        1.05 * positive["smile"] - 0.25 * (-half["smile"]).clamp_min(0.0),
        1.1 * positive["jaw"] * positive["jaw"],
        half["brows"],
        1.2 * (positive["frown"] - 0.2).clamp_min(0.0),
        1.5 * (positive["pucker"] - 0.5).clamp_min(0.0),
    )
    closed = ((half["eyelids"] - 0.7) / 0.24).clamp(0.0, 1.0) + 0.3 * half["eyelids"].clamp(max=0.0)
    return on_grid(torch.cat(amounts, 1), 12), closed


def _hue(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return red, green and blue: gray at 0, and more colorful away from it."""
    third, much = 2.0 * math.pi / 3.0, 0.3 * torch.tanh(x.abs())
    red, green, blue = (1.0 + much * torch.cos(1.5 * x - i * third) for i in range(3))
    return red, green, blue


def _rotation(dim: int, numbers: int) -> Tensor:
    """Return (D, K) float64 on a grid: e @ it has numbers of unit variance for a random unit e."""
    gaussian = np.random.default_rng(0).standard_normal((max(dim, numbers), min(dim, numbers)))
    q, r = torch.linalg.qr(torch.from_numpy(gaussian))
    q = q * r.diagonal().sign()
    q = q if dim >= numbers else q.T / q.T.norm(dim=0)
    return on_grid(q * math.sqrt(dim), 16)
