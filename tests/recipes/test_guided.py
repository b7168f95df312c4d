"""The pieces of CFSM against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from synface.recipes.cfsm.model import (
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    StyleSpace,
    adain,
    guided_styles,
    identity_gap,
    identity_loss,
    lsgan_loss,
    orthogonality_loss,
    subspace_similarity,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import synface_kernels as sk
from tests.helpers.seeded import random, seeded

TINY = GeneratorConfig(styles=3, latent=6, width=4, downsamplings=1, blocks=1, hidden=8)


# -- losses --------------------------------------------------------------------------------------


def test_orthonormal_columns_cost_nothing():
    basis = torch.linalg.qr(random(8, 3, dtype=torch.float64))[0]
    assert orthogonality_loss(basis, "l1") < 1e-14
    assert orthogonality_loss(basis, "mean_square") < 1e-28


def test_orthogonality_by_hand():
    basis = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)  # UᵀU = [[1, 2], [2, 5]]
    assert orthogonality_loss(basis).item() == 0 + 2 + 2 + 4
    assert orthogonality_loss(basis, "mean_square").item() == (0 + 4 + 4 + 16) / 4


@pytest.mark.parametrize("kind", ["l1", "mean_square"])
def test_the_gradient_of_orthogonality(kind):
    basis = random(7, 4, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(orthogonality_loss(basis, kind), basis)
    excess = basis.T @ basis - torch.eye(4, dtype=torch.float64)
    outer = excess.sign() if kind == "l1" else 2 * excess / 16
    torch.testing.assert_close(gradient, 2 * basis @ outer, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda u: orthogonality_loss(u, kind), basis)


def test_the_identity_gap_at_its_ends():
    strength = torch.tensor([0.0, 3.0, 6.0, 7.0], dtype=torch.float64)
    expected = torch.tensor([0.05, 0.35, 0.65, 0.75], dtype=torch.float64)
    torch.testing.assert_close(identity_gap(strength), expected)
    other = identity_gap(strength[:3], least=0.0, most=1.0, strongest=3.0)
    torch.testing.assert_close(other, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))


def test_the_identity_loss_is_its_formula():
    a, b = random(5, 4, dtype=torch.float64), random(5, 4, seed=1, dtype=torch.float64)
    strength = random(5, dtype=torch.float64).abs()
    terms = [
        (1 - (x @ y / (x.norm() * y.norm())).item() - (0.05 + 0.1 * s.item())) ** 2
        for x, y, s in zip(a, b, strength, strict=True)
    ]
    assert identity_loss(a, b, strength).item() == pytest.approx(sum(terms) / 5, rel=1e-12)
    at_rest = identity_loss(a, a, torch.zeros(5, dtype=torch.float64))
    assert at_rest.item() == pytest.approx(0.05**2)


def test_lsgan_sums_over_scales_and_averages_over_patches():
    maps = [torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0]])]
    assert lsgan_loss(maps, 1.0).item() == (0 + 4) / 2 + 1


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adain_is_its_definition(memory_format):
    x = (3 + 2 * random(2, 3, 5, 4, dtype=torch.float64)).to(memory_format=memory_format)
    scale = random(2, 3, seed=1, dtype=torch.float64)
    bias = random(2, 3, seed=2, dtype=torch.float64)
    mean = x.mean((2, 3), keepdim=True)
    spread = (x - mean).square().mean((2, 3), keepdim=True)
    expected = (x - mean) / (spread + 1e-5).sqrt() * scale[..., None, None] + bias[..., None, None]
    result = adain(x, scale, bias)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert result.is_contiguous(memory_format=memory_format)


def test_the_style_space_is_linear():
    space = seeded(lambda: StyleSpace(3, 6))
    space.mean.data = random(6)
    o = random(4, 3)
    expected = torch.stack([space.basis @ row + space.mean for row in o])
    torch.testing.assert_close(space(o), expected)
    assert torch.equal(space(torch.zeros(1, 3))[0], space.mean)


@pytest.mark.parametrize(("channels", "size", "downsamplings"), [(1, (16, 12), 1), (3, (8, 8), 2)])
def test_a_generator_keeps_the_shape_and_the_range(channels, size, downsamplings):
    config = GeneratorConfig(3, 6, width=4, downsamplings=downsamplings, blocks=2, hidden=8)
    generator = seeded(lambda: Generator(config, channels))
    images, o = random(2, channels, *size).tanh(), random(2, 3)
    drawn = generator(images, o)
    assert drawn.shape == images.shape
    assert drawn.abs().max() <= 1
    assert torch.equal(drawn, generator(images, o))
    alone = generator(images[:1], o[:1])  # no image depends on the others
    torch.testing.assert_close(drawn[:1], alone, rtol=1e-5, atol=1e-5)
    drawn.sum().backward()
    silent = [name for name, p in generator.named_parameters() if p.grad is None]
    assert silent == []


def test_a_style_changes_what_is_drawn():
    generator = seeded(lambda: Generator(TINY))
    images = random(2, 1, 8, 8).tanh().repeat(1, 1, 1, 1)
    a, b = generator(images, torch.zeros(2, 3)), generator(images, torch.full((2, 3), 2.0))
    assert (a - b).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_papers_sizes():
    generator, discriminator = Generator(channels=3), Discriminator(channels=3)
    images = random(1, 3, 112, 112).tanh()
    with torch.no_grad():
        assert generator(images, random(1, 10)).shape == images.shape
        maps = discriminator(images)
    assert tuple(generator.space.basis.shape) == (128, 10)
    assert [tuple(each.shape) for each in maps] == [(1, 1, 7, 7), (1, 1, 3, 3), (1, 1, 1, 1)]


def test_a_discriminator_sees_every_scale():
    discriminator = Discriminator(DiscriminatorConfig(4, 2, 3))
    maps = discriminator(random(2, 1, 16, 32))
    assert [tuple(each.shape) for each in maps] == [(2, 1, 4, 8), (2, 1, 2, 4), (2, 1, 1, 2)]


# -- similarity ----------------------------------------------------------------------------------


def test_a_subspace_is_similar_to_itself():
    a, b = seeded(lambda: StyleSpace(4, 9), 1), seeded(lambda: StyleSpace(4, 9), 2)
    assert subspace_similarity(a, a) == pytest.approx(1.0, abs=1e-12)
    assert subspace_similarity(a, b) == subspace_similarity(b, a) < 0.9
    a.mean.data, b.mean.data = random(9), random(9, seed=1)
    cosines = [
        F.cosine_similarity(a.basis[:, i] + a.mean, b.basis[:, i] + b.mean, dim=0).item()
        for i in range(4)
    ]
    assert subspace_similarity(a, b) == pytest.approx(sum(cosines) / 4, rel=1e-5)


# -- the guided step -----------------------------------------------------------------------------


class Linear(nn.Module):
    """A generator without images: the embedding is A·o + b. A backbone that changes nothing."""

    def __init__(self, matrix, offset):
        super().__init__()
        self.matrix, self.offset = nn.Parameter(matrix), nn.Parameter(offset)

    def forward(self, images, o):
        return o @ self.matrix.T + self.offset


class Identity(nn.Module):
    def forward(self, x):
        return x


def case():
    matrix, offset = random(5, 3, dtype=torch.float64), random(5, seed=1, dtype=torch.float64)
    weight = random(7, 5, seed=2, dtype=torch.float64)
    o, target = random(6, 3, seed=3, dtype=torch.float64), torch.arange(6)
    return Linear(matrix, offset), weight, o, target


def by_hand(generator, weight, o, target, scale, shift):
    """Return ∂L/∂o of CosFace, written out: no autograd, no op."""
    gradients = []
    for row, label in zip(o, target.tolist(), strict=True):
        x = generator.matrix.detach() @ row + generator.offset.detach()
        unit, centers = x / x.norm(), weight / weight.norm(dim=1, keepdim=True)
        cosines = centers @ unit
        logits = scale * cosines
        logits[label] -= scale * shift
        difference = torch.softmax(logits, 0)
        difference[label] -= 1
        along = scale * difference @ centers
        gradients.append(generator.matrix.detach().T @ ((along - (along @ unit) * unit) / x.norm()))
    return torch.stack(gradients)


def test_the_guided_step_follows_the_hand_computed_gradient():
    generator, weight, o, target = case()
    images = torch.zeros(6, 1, 2, 2)
    guided = guided_styles(
        generator, Identity(), weight, images, target, o, sk.CosFace(16.0, 0.2), epsilon=0.314
    )
    gradient = by_hand(generator, weight, o, target, 16.0, 0.2)
    assert gradient.abs().min() > 1e-9
    torch.testing.assert_close(guided - o, 0.314 * gradient.sign())
    assert not guided.requires_grad
    still = guided_styles(generator, Identity(), weight, images, target, o, epsilon=0.0)
    assert torch.equal(still, o)


def test_the_guided_step_stays_within_its_bound():
    generator = seeded(lambda: Generator(TINY))
    backbone = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), 1)
    o = 5 * random(20, 3, seed=1)
    images, target = random(20, 1, 8, 8).tanh(), torch.arange(20) % 7
    guided = guided_styles(generator, backbone, random(7, 5), images, target, o)
    assert (guided <= o + 0.314).all()
    assert (guided >= o - 0.314).all()
    assert ((guided - o).abs() > 0.3139).all()  # a full step, since no gradient is zero


class Calls(TorchDispatchMode):
    """Names and arguments of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function, args))
        return function(*args, **(kwargs or {}))


def test_the_guided_step_computes_no_gradient_of_parameters():
    generator = seeded(lambda: Generator(TINY))
    backbone = seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 5))
    )
    backbone.train()
    statistics = {k: v.clone() for k, v in backbone.state_dict().items()}
    weight = random(7, 5).requires_grad_()
    with Calls() as calls, torch.no_grad():
        guided_styles(
            generator, backbone, weight, random(4, 1, 8, 8), torch.arange(4), random(4, 3)
        )
    backward = [args for f, args in calls.seen if "margin_cross_entropy_backward" in f.name()]
    assert len(backward) == 1
    schema = torch.ops.synface_kernels.margin_cross_entropy_backward.default._schema.arguments
    asked = {a.name: value for a, value in zip(schema, backward[0], strict=False)}
    assert asked["needs_input_grad"] is True
    assert asked["needs_weight_grad"] is False
    convolutions = [
        a[-1] for f, a in calls.seen if f is torch.ops.aten.convolution_backward.default
    ]
    assert convolutions  # of input, weight, bias: no weight's, no bias'
    assert all(mask[1:] == [False, False] for mask in convolutions)
    for module in (generator, backbone):
        assert all(p.grad is None for p in module.parameters())
    assert weight.grad is None
    assert backbone.training
    assert all(torch.equal(v, statistics[k]) for k, v in backbone.state_dict().items())


def test_the_guided_step_raises_the_loss_of_a_smooth_model():
    generator, weight, o, target = case()
    margin = sk.ArcFace(16.0, 0.3)
    images = torch.zeros(6, 1, 2, 2)

    def loss(styles):
        return sk.margin_cross_entropy(
            generator(images, styles), weight, target, margin=margin, reduction="none"
        )

    guided = guided_styles(generator, Identity(), weight, images, target, o, margin, epsilon=1e-4)
    assert (loss(guided) > loss(o)).all()


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthogonality_loss(random(4)), "basis must be floating point and 2-dim"),
        (lambda: orthogonality_loss(random(4, 2), "l2"), "kind must be one of .*, got 'l2'"),
        (lambda: identity_gap(random(4), most=3.0), r"most must be in \[0, 2\], got 3"),
        (lambda: identity_gap(random(4), least=0.7), r"least must be in \[0, 0.65\], got 0.7"),
        (lambda: identity_gap(random(4), strongest=0.0), "strongest must be finite and"),
        (lambda: identity_loss(random(4, 2), random(4, 3), random(4)), r"changed must be \(4, 2\)"),
        (lambda: identity_loss(random(4, 2), random(4, 2), random(3)), r"strength \(4,\), got"),
        (lambda: adain(random(2, 3, 4, 4), random(2, 4), random(2, 3)), r"x must be \(N, C, H, W"),
        (lambda: GeneratorConfig(styles=10, latent=8), "latent must be at least styles = 10"),
        (lambda: GeneratorConfig(width=0), "width must be at least 1, got 0"),
        (lambda: DiscriminatorConfig(scales=0), "scales must be at least 1, got 0"),
        (lambda: StyleSpace(3, 6)(random(2, 4)), r"o must be floating point and of shape \(N, 3\)"),
        (lambda: Generator(TINY)(random(2, 3, 8, 8), random(2, 3)), r"of shape \(N, 1, H, W\)"),
        (lambda: Generator(TINY)(random(2, 1, 8, 7), random(2, 3)), "multiples of 2"),
        (lambda: Generator(TINY)(random(2, 1, 8, 8), random(3, 3)), "o must have a row per image"),
        (lambda: Discriminator()(random(2, 1, 32, 32)), "images must have sides of 64 or more"),
        (lambda: subspace_similarity(StyleSpace(3, 6), StyleSpace(3, 7)), r"same d and q"),
        (
            lambda: guided_styles(
                Identity(),
                Identity(),
                random(3, 2),
                random(1, 1, 2, 2),
                torch.zeros(1),
                random(1, 2),
                epsilon=math.nan,
            ),
            "epsilon must be finite",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
