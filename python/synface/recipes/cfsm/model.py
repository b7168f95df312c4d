"""Controllable and guided face synthesis (CFSM): styles learned from unlabeled target images.

Stage 1 learns a linear space of styles, z = U·o + μ with o ~ N(0, I), and a generator that redraws
a face in the style z; ‖o‖ is the style's strength, and o = 0 leaves the face as it is. Stage 2
trains a recognizer on originals and on faces whose style was moved, within ±ε, so that the
recognizer's loss grows.

Source: Liu, Kim, Jain, Liu, "Controllable and Guided Face Synthesis for Unconstrained Face
Recognition", ECCV 2022. The networks: Huang et al., "Multimodal Unsupervised Image-to-Image
Translation" (MUNIT), ECCV 2018. AdaIN: Huang and Belongie, ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import synface_kernels as sk

from ...common.check import check_integer, check_integers, check_number, describe
from ...common.modes import evaluating
from .additions import smooth_fields, wake, with_residuals

EPSILON = 0.314  # of the authors' code
ORTHOGONALITY = ("l1", "mean_square")


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator's sizes; the defaults are the paper's, for 112×112.

    Attributes:
        styles: q, numbers in o. latent: d, numbers in z; at least q.
        width: channels of the first layer; each downsampling doubles them.
        downsamplings: each halves the image's sides, which must be multiples of 2^downsamplings.
        blocks: residual blocks of the encoder, and of the decoder.
        hidden: width of the MLP from z to AdaIN's scales and biases.
        noise: add white noise whose strength z sets; not in the paper.
        blend: draw (1 − s)·X + s·decoder, whose share s z sets; not in the paper.
        light: add a smooth field, n² − 1 cosines whose weights z sets; 0, the paper's: none.
        awake: standard deviation of the MLP's initial outputs; 0, the paper's: as torch has them.
    """

    styles: int = 10
    latent: int = 128
    width: int = 64
    downsamplings: int = 2
    blocks: int = 3
    hidden: int = 256
    noise: bool = False
    blend: bool = False
    light: int = 0
    awake: float = 0.0

    def __post_init__(self) -> None:
        check_integers(self, styles=1, latent=1, width=1, downsamplings=0, blocks=1, hidden=1)
        check_integers(self, light=0)
        if self.light == 1:
            raise ValueError("light must be 0, or at least 2, got 1, which adds no field")
        check_number("awake", self.awake, 0.0)
        if self.latent < self.styles:
            raise ValueError(
                f"latent must be at least styles = {self.styles}, for orthogonal columns, "
                f"got {self.latent}"
            )


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator's sizes; the defaults are the paper's, for 112×112.

    Attributes:
        width: channels of the first layer; each of the others doubles them.
        layers: convolutions that halve the sides. scales: networks, each at half the size.
        residuals: show it the images' high-pass residuals as well; not in the paper.
    """

    width: int = 64
    layers: int = 4
    scales: int = 3
    residuals: bool = False

    def __post_init__(self) -> None:
        check_integers(self, width=1, layers=1, scales=1)


def orthogonality_loss(basis: Tensor, kind: str = "l1") -> Tensor:
    """Return the distance of the columns of U from orthonormality.

    Args:
        basis: U, (d, q) floating.
        kind: "l1" (the paper's): the sum over the entries of |UᵀU − I|; "mean_square" (the
            authors' code): the mean over the entries of its square.

    Returns:
        () of basis' dtype.

    Raises:
        ValueError: for another shape, dtype or kind.
    """
    _require_rows("basis", basis, None)
    excess = basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    if kind == "l1":
        return excess.abs().sum()
    if kind == "mean_square":
        return excess.square().mean()
    raise ValueError(f"kind must be one of {ORTHOGONALITY}, got {kind!r}")


def identity_gap(
    strength: Tensor, least: float = 0.05, most: float = 0.65, strongest: float = 6.0
) -> Tensor:
    """Compute g(a), the cosine distance from the original that a style of strength a should have.

    It is linear, from ``least`` at a = 0 to ``most`` at a = ``strongest``, and extrapolated beyond.

    Args:
        strength: a = ‖o‖, floating of any shape.

    Returns:
        Of strength's shape and dtype.

    Raises:
        ValueError: for distances outside [0, 2], least over most, or strongest not positive.
    """
    check_number("most", most, 0.0, 2.0)
    check_number("least", least, 0.0, most)
    check_number("strongest", strongest, 1e-6)
    return least + (most - least) / strongest * strength


def identity_loss(original: Tensor, changed: Tensor, strength: Tensor) -> Tensor:
    """Compute L_id, the mean over a batch of (1 − cos(f(X), f(X̂)) − g(a))².

    Args:
        original, changed: f(X) and f(X̂), (N, D) floating, not normalized.
        strength: a, (N,).

    Returns:
        () of the embeddings' dtype.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    _require_rows("original", original, None)
    if changed.shape != original.shape or strength.shape != original.shape[:1]:
        raise ValueError(
            f"changed must be {tuple(original.shape)} and strength ({len(original)},), "
            f"got {describe(changed)} and {describe(strength)}"
        )
    distance = 1.0 - F.cosine_similarity(original, changed)
    return (distance - identity_gap(strength)).square().mean()


def adain(x: Tensor, scale: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Apply adaptive instance normalization: scale · (x − mean)/√(var + eps) + bias.

    Mean and (biased) variance are of each channel of each image. The memory format is preserved.

    Args:
        x: (N, C, H, W) floating. scale, bias: (N, C).

    Returns:
        Of x's shape and dtype.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if x.ndim != 4 or scale.shape != x.shape[:2] or bias.shape != x.shape[:2]:
        raise ValueError(
            "x must be (N, C, H, W), scale and bias (N, C), "
            f"got {describe(x)}, {describe(scale)} and {describe(bias)}"
        )
    # One group per channel; instance_norm would force NCHW.
    normal = F.group_norm(x, x.shape[1], eps=eps)
    return normal * scale[:, :, None, None] + bias[:, :, None, None]


class StyleSpace(nn.Module):
    """Style subspace z = U·o + μ.

    U starts as N(0, 1/d), with columns of about unit length that training makes orthogonal.

    Args:
        styles: q. latent: d.

    Attributes:
        basis: U, (d, q). mean: μ, (d,), at first zero.
    """

    def __init__(self, styles: int = 10, latent: int = 128) -> None:
        super().__init__()
        check_integer("styles", styles, 1)
        check_integer("latent", latent, styles)
        self.basis = nn.Parameter(torch.randn(latent, styles) / latent**0.5)
        self.mean = nn.Parameter(torch.zeros(latent))

    def forward(self, o: Tensor) -> Tensor:
        """Map (N, q) to (N, d); raise ValueError for another shape."""
        _require_rows("o", o, self.basis.shape[1])
        return o @ self.basis.T + self.mean


def subspace_similarity(a: StyleSpace, b: StyleSpace) -> float:
    """Compute S(A, B) = (1/q)·Σ_i cos(u_A^i + μ_A, u_B^i + μ_B), in [−1, 1].

    It compares column i with column i, so it needs spaces with the same initialization.

    Raises:
        ValueError: for spaces of different sizes.
    """
    if a.basis.shape != b.basis.shape:
        raise ValueError(
            "the spaces must have the same d and q, "
            f"got {tuple(a.basis.shape)} and {tuple(b.basis.shape)}"
        )
    with torch.no_grad():
        one, other = ((each.basis.T + each.mean).double().cpu() for each in (a, b))
        return F.cosine_similarity(one, other).mean().item()


class _Residual(nn.Module):
    """Residual block x + norm(conv(ReLU(norm(conv(x))))); norm is AdaIN where a style is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        options = {"padding": 1, "padding_mode": "reflect"}
        self.first = nn.Conv2d(channels, channels, 3, **options)  # type: ignore[arg-type]
        self.second = nn.Conv2d(channels, channels, 3, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, style: Sequence[Tensor] | None = None) -> Tensor:
        """Apply the block; ``style`` has two scales and two biases, (N, C) each."""
        if style is None:
            normal = lambda y: F.group_norm(y, y.shape[1])  # noqa: E731
            return x + normal(self.second(F.relu(normal(self.first(x)))))
        scale1, bias1, scale2, bias2 = style
        y = F.relu(adain(self.first(x), scale1, bias1))
        return x + adain(self.second(y), scale2, bias2)


class Generator(nn.Module):
    """Generator that redraws faces in a style: a content encoder, and a decoder driven by AdaIN.

    Args:
        config: the sizes. channels: of the images, 1 or 3.

    Attributes:
        space: the `StyleSpace`.
    """

    def __init__(self, config: GeneratorConfig | None = None, channels: int = 1) -> None:
        super().__init__()
        config = config or GeneratorConfig()
        check_integer("channels", channels, 1)
        self.config, self.channels = config, channels
        self.space = StyleSpace(config.styles, config.latent)
        width = config.width
        reflect = {"padding": 3, "padding_mode": "reflect"}
        encoder = [nn.Conv2d(channels, width, 7, **reflect)]  # type: ignore[arg-type]
        for _ in range(config.downsamplings):
            encoder.append(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1))
            width *= 2
        self.encoder = nn.ModuleList(encoder)
        self.content = nn.ModuleList(_Residual(width) for _ in range(config.blocks))
        self.styled = nn.ModuleList(_Residual(width) for _ in range(config.blocks))
        self.mlp = nn.Sequential(
            nn.Linear(config.latent, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.blocks * 4 * width),
        )
        decoder: list[nn.Module] = []
        for _ in range(config.downsamplings):
            decoder += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, width // 2, 5, padding=2),
                nn.GroupNorm(1, width // 2),
                nn.ReLU(),
            ]
            width //= 2
        decoder += [nn.Conv2d(width, channels, 7, **reflect), nn.Tanh()]  # type: ignore[arg-type]
        self.decoder = nn.Sequential(*decoder)
        if config.blend:
            self.blend = nn.Linear(config.hidden, 1)
            nn.init.constant_(self.blend.bias, -2.0)
        if config.light > 1:
            self.light = nn.Linear(config.hidden, config.light**2 - 1)
        if config.noise:
            self.noise = nn.Linear(config.hidden, 1)
            nn.init.constant_(self.noise.bias, -2.0)
        if config.awake:
            basis = self.space.basis
            o = torch.randn(512, config.styles, dtype=basis.dtype, device=basis.device)
            wake(self.mlp, self.space(o).detach(), config.awake)

    def forward(self, images: Tensor, o: Tensor, noise: Tensor | None = None) -> Tensor:
        """Redraw each image in its style.

        Args:
            images: (N, C, H, W) floating in [−1, 1], H and W multiples of 2^downsamplings.
            o: (N, q).
            noise: standard normal draws of images' shape, for a generator with noise; by default
                from torch's global generator.

        Returns:
            Of images' shape, in [−1, 1].

        Raises:
            ValueError: for shapes that do not fit.
        """
        _require_images(images, self.channels)
        multiple = 2**self.config.downsamplings
        if images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"images must have sides that are multiples of {multiple}, got {describe(images)}"
            )
        if len(o) != len(images):
            raise ValueError(f"o must have a row per image, {len(images)}, got {describe(o)}")
        x = images
        for layer in self.encoder:
            x = layer(x)
            x = F.relu(F.group_norm(x, x.shape[1]))
        for block in self.content:
            x = block(x)
        hidden = self.mlp[:-1](self.space(o))
        styles = self.mlp[-1](hidden).view(len(o), len(self.styled), 4, -1)
        for i, block in enumerate(self.styled):
            x = block(x, styles[:, i].unbind(1))
        whole = drawn = self.decoder(x)
        if self.config.blend:
            share = torch.sigmoid(self.blend(hidden))[:, :, None, None]
            drawn = images + share * (drawn - images)
        if self.config.light > 1:
            height, width = images.shape[2:]
            fields = smooth_fields(height, width, self.config.light, hidden.device)
            drawn = drawn + (self.light(hidden) @ fields.to(hidden).flatten(1)).view_as(
                images[:, :1]
            )
        if self.config.noise:
            strength = F.softplus(self.noise(hidden))[:, :, None, None]
            noise = torch.randn_like(images) if noise is None else noise
            drawn = drawn + strength * noise
        return drawn if drawn is whole else drawn.clamp(-1.0, 1.0)


class Discriminator(nn.Module):
    """Patch discriminators, each at half the resolution of the one before; without norms.

    Args:
        config: the sizes. channels: of the images.
    """

    def __init__(self, config: DiscriminatorConfig | None = None, channels: int = 1) -> None:
        super().__init__()
        config = config or DiscriminatorConfig()
        check_integer("channels", channels, 1)
        self.config, self.channels = config, channels
        seen = 2 * channels if config.residuals else channels
        self.scales = nn.ModuleList(self._patches(config, seen) for _ in range(config.scales))

    @staticmethod
    def _patches(config: DiscriminatorConfig, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        width = config.width
        for _ in range(config.layers):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, width = width, 2 * width
        return nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (N, C, H, W) to a (N, 1, h, w) map of patches per scale.

        Raises:
            ValueError: for another shape, or images too small for the last scale.
        """
        _require_images(images, self.channels)
        least = 2 ** (self.config.layers + self.config.scales - 1)
        if min(images.shape[2:]) < least:
            raise ValueError(
                f"images must have sides of {least} or more for {self.config.layers} layers at "
                f"{self.config.scales} scales, got {describe(images)}"
            )
        maps = []
        for i, network in enumerate(self.scales):
            if i:
                images = F.avg_pool2d(images, 3, 2, padding=1, count_include_pad=False)
            maps.append(network(with_residuals(images) if self.config.residuals else images))
        return maps


def lsgan_loss(maps: Sequence[Tensor], value: float) -> Tensor:
    """Compute L_adv: the sum over the scales of the mean of (D − value)²; 1 is real, 0 generated.

    Source: Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017.
    """
    return torch.stack([(each - value).square().mean() for each in maps]).sum()


def guided_styles(
    generator: nn.Module,
    backbone: nn.Module,
    weight: Tensor,
    images: Tensor,
    target: Tensor,
    o: Tensor,
    margin: sk.CombinedMargin | None = None,
    epsilon: float = EPSILON,
    impl: str = "auto",
) -> Tensor:
    """Move each style a step towards a larger loss: o* = o + ε·sign(∂/∂o L_cls(F(G(X, o)), y)).

    The loss is `synface_kernels.margin_cross_entropy`. Its gradient is asked for the embeddings
    alone: none is computed for the class centers or for either network's parameters, and no
    ``.grad`` changes. The backbone runs in evaluation mode, so its statistics stay as they are
    and nothing is random; the modes are restored.

    Args:
        generator: (images, o) to images. backbone: images to (N, D) embeddings.
        weight: class centers, (C, D).
        images: X, (N, C, H, W). target: y, (N,) or another target that the loss takes.
        o: (N, q). margin: of the loss. epsilon: ε, not negative.
        impl: the implementation of the loss.

    Returns:
        o*, (N, q) without a gradient, no entry further than ε from o's.

    Raises:
        ValueError: for an epsilon out of range or shapes that do not fit.

    Memory: the activations of the two networks that the gradient of their input needs.
    """
    check_number("epsilon", epsilon, 0.0)
    _require_rows("o", o, None)
    start = o.detach()
    moved = start.clone().requires_grad_()
    with torch.enable_grad(), evaluating(generator, backbone):
        embeddings = backbone(generator(images, moved))
        loss = sk.margin_cross_entropy(
            embeddings,
            weight.detach(),
            target,
            margin=sk.ArcFace() if margin is None else margin,
            reduction="sum",  # each row's gradient on its own scale
            impl=impl,
        )
        (gradient,) = torch.autograd.grad(loss, moved)
    # The sum may round beyond ε.
    return (start + epsilon * gradient.sign()).clamp(start - epsilon, start + epsilon)


def _require_rows(name: str, value: Tensor, columns: int | None) -> None:
    if value.ndim != 2 or not value.is_floating_point() or columns not in (None, value.shape[1]):
        shape = "2-dimensional" if columns is None else f"of shape (N, {columns})"
        raise ValueError(f"{name} must be floating point and {shape}, got {describe(value)}")


def _require_images(images: Tensor, channels: int) -> None:
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point of shape (N, {channels}, H, W), got {describe(images)}"
        )
