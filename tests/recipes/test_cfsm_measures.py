"""The measures of style spaces on spaces whose answer is known, and what is added to stage 1."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from synface.recipes.cfsm import load_config
from synface.recipes.cfsm.additions import (
    StatisticsLoss,
    StylePredictor,
    energy_distance,
    smooth_fields,
    texture_statistics,
    wake,
)
from synface.recipes.cfsm.config import (
    ADDITIONS,
    ALL,
    CfsmConfig,
    GuidedConfig,
    StyleConfig,
    additions,
    described,
    without,
)
from synface.recipes.cfsm.measures import (
    STATISTICS,
    axis_effects,
    controllability,
    image_statistics,
    matching,
    recovery,
    words,
)
from synface.recipes.cfsm.model import (
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
)
from torch import nn

from tests.helpers.seeded import random, seeded

OURS = GeneratorConfig(4, 8, 4, 1, 1, 8, noise=True, blend=True, light=3, awake=0.5)


# -- controllability -----------------------------------------------------------------------------


def test_axes_that_change_different_pixels_are_fully_controllable():
    patterns = torch.linalg.qr(random(64, 4))[0].T.reshape(4, 1, 8, 8)

    def draw(images, o):
        return images + (o[:, :, None, None, None] * patterns).sum(1)

    found = controllability(draw, random(3, 1, 8, 8), 4, seed=0, directions=4000)
    assert found["axis cosine"] == pytest.approx(0, abs=1e-5)
    assert found["opposite cosine"] == pytest.approx(-1, abs=1e-5)
    assert found["direction share"] == pytest.approx(1, abs=0.01)  # no common change


def test_a_change_that_sees_only_the_strength_is_not_controllable():
    pattern = random(1, 8, 8)

    def draw(images, o):
        return images + o.norm(dim=1)[:, None, None, None] * pattern

    found = controllability(draw, random(3, 1, 8, 8), 4, seed=0)
    assert found["axis cosine"] == pytest.approx(1, abs=1e-5)
    assert found["opposite cosine"] == pytest.approx(1, abs=1e-5)
    assert found["direction share"] == pytest.approx(0, abs=1e-5)


def test_the_direction_share_is_the_share_of_the_variance():
    """A common change of squared length 9·c² beside one of 9: the share is 1/(1 + c²)."""
    patterns = torch.linalg.qr(random(64, 5))[0].T.reshape(5, 1, 8, 8)
    common = 0.5

    def draw(images, o):
        along = (o[:, :, None, None, None] * patterns[:4]).sum(1)
        return images + along + common * o.norm(dim=1)[:, None, None, None] * patterns[4]

    found = controllability(draw, random(2, 1, 8, 8), 4, seed=0, directions=4000)
    assert found["direction share"] == pytest.approx(1 / (1 + common**2), abs=0.01)
    assert found["axis cosine"] == pytest.approx(common**2 / (1 + common**2), abs=1e-5)


def test_one_axis_has_no_pair_to_compare():
    found = controllability(lambda x, o: x + o[:, :, None, None], random(2, 1, 8, 8), 1, seed=0)
    assert found["axis cosine"] is None


def test_nothing_drawn_measures_as_nothing():
    found = controllability(lambda x, o: x, random(2, 1, 8, 8), 3, seed=0)
    assert found == {"axis cosine": 0, "opposite cosine": 0, "direction share": 0}


def test_recovery_is_r_squared():
    o = random(50, 4, dtype=torch.float64)
    assert recovery(o, o) == 1
    assert recovery(o.mean().expand_as(o), o) == pytest.approx(0, abs=1e-12)
    assert recovery(-o, o) < -1


def test_effects_name_what_an_axis_does():
    def draw(images, o):
        zeros = torch.zeros_like(images)
        return images * (1 + 0.2 * o[:, 1, None, None, None]) + o[:, :1, None, None] + zeros

    images = 0.1 * random(40, 1, 8, 8) + 0.3 * random(40, 1, 1, 1, seed=1)
    effects = axis_effects(draw, images, 3)
    brightness = effects["brightness"]
    expected = 3 / image_statistics(images)["brightness"].std()
    torch.testing.assert_close(brightness[:, 0], torch.stack([expected, -expected]))
    assert words(effects)[0] == ["brighter", "darker"]
    assert words(effects)[1] in (["more contrast", "less contrast"], ["noisier", "blurrier"])
    assert words({name: -values for name, values in effects.items()})[0] == ["darker", "brighter"]
    assert all(values[:, 2].abs().max() == 0 for values in effects.values())
    assert words(effects)[2] == ["little", "little"]


# -- matching ------------------------------------------------------------------------------------


def test_the_statistics_of_known_images():
    x = 0.5 * random(200, 1, 32, 32) + 0.25
    found = {name: values.mean().item() for name, values in image_statistics(x).items()}
    assert found["brightness"] == pytest.approx(0.25, abs=0.005)
    assert found["contrast"] == pytest.approx(0.5, abs=0.01)
    # A pixel less the mean of nine has variance 8/9; reflected borders change that a little.
    assert found["noise"] == pytest.approx(0.5 * math.sqrt(8 / 9), rel=0.02)
    assert found["sharpness"] == pytest.approx(math.sqrt(8 / 9), rel=0.02)
    flat = image_statistics(torch.ones(2, 3, 8, 8))
    assert flat["noise"].abs().max() < 1e-6
    assert all(torch.isfinite(values).all() for values in flat.values())


def test_matching_against_target_and_source():
    source, target = 0.1 * random(60, 1, 8, 8), 0.3 * random(60, 1, 8, 8, seed=1) + 0.5
    same = matching(target, target, source)
    assert all(x["W1"] == 0 and x["spread ratio"] == 1 for x in same.values())
    none = matching(source, target, source)
    for x in none.values():
        assert x["W1 ratio"] == pytest.approx(1)
        assert x["spread ratio"] == x["spread ratio of source"]
    assert tuple(same) == STATISTICS
    brightness = image_statistics(source)["brightness"]
    assert none["brightness"]["differs"] == pytest.approx(0.5 / brightness.std().item(), rel=0.2)
    # Brighter alone: W1 is the shift, whatever the distribution; and of samples of any size.
    shifted = matching(source, source + 0.7, source)
    assert shifted["brightness"]["W1"] == pytest.approx(0.7, rel=1e-5)
    assert shifted["noise"]["W1"] == pytest.approx(0, abs=1e-6)
    flat = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert matching(torch.zeros(5, 1, 8, 8), flat, source)["brightness"]["W1"] == 0.5


def test_matching_images_that_are_all_the_same():
    flat = torch.zeros(10, 1, 8, 8)
    found = matching(flat, flat, flat)
    assert all(math.isfinite(value) for x in found.values() for value in x.values())


# -- additions to stage 1 ------------------------------------------------------------------------


def test_the_energy_distance_is_its_definition():
    a, b = random(5, 3, dtype=torch.float64), random(7, 3, seed=1, dtype=torch.float64)

    def apart(x, y, pairs):
        return sum((i - j).abs().sum().item() for i in x for j in y) / pairs

    expected = 2 * apart(a, b, 35) - apart(a, a, 20) - apart(b, b, 42)
    assert energy_distance(a, b).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: energy_distance(x, b), a.requires_grad_())


def test_the_energy_distance_has_no_bias():
    """Its mean over equal distributions is zero, also for the smallest batches."""
    draws = [
        energy_distance(random(2, 1, seed=i, dtype=torch.float64), random(9, 1, seed=10**6 + i))
        for i in range(3000)
    ]
    values = torch.stack(draws)
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    shifted = energy_distance(random(500, 1), random(500, 1, seed=1) + 1.0)
    assert shifted > 0.3


def test_the_energy_distance_pulls_the_spread_both_ways():
    """The gradient narrows samples that are too wide, and widens those that are too narrow."""
    wanted = random(2000, 1, seed=1)
    for scale, sign in ((0.5, -1), (2.0, 1)):
        factor = torch.tensor(scale, requires_grad=True)
        energy_distance(factor * random(500, 1), wanted).backward()
        assert factor.grad * sign > 0


def test_texture_statistics_tell_noise_from_stripes():
    noise = random(8, 1, 16, 16)
    stripes = random(8, 1, 16, 1, seed=1).expand(-1, -1, -1, 16)
    stripes = stripes * (noise.std((2, 3)) / stripes.std((2, 3)))[:, :, None, None]
    a, b = texture_statistics(noise), texture_statistics(stripes)
    assert a.shape == (8, 9)
    torch.testing.assert_close(a[:, 1], b[:, 1], rtol=1e-3, atol=1e-3)  # of the same deviation
    assert (a[:, 2] - b[:, 2]).min() > 2  # along the stripes
    assert texture_statistics(random(2, 3, 16, 16)).shape == (2, 27)
    assert torch.isfinite(texture_statistics(torch.ones(2, 1, 16, 16))).all()


def test_the_statistics_loss_is_least_for_the_target():
    target = 0.3 * random(64, 1, 16, 16) + 0.2 * random(64, 1, 1, 1, seed=1)
    loss = StatisticsLoss(target)
    near = loss(0.3 * random(64, 1, 16, 16, seed=2) + 0.2 * random(64, 1, 1, 1, seed=3))
    assert abs(near) < 0.3
    assert loss(0.1 * random(64, 1, 16, 16, seed=2)) > 10 * abs(near)
    flat = StatisticsLoss(torch.zeros(4, 1, 16, 16))
    assert torch.isfinite(flat(random(4, 1, 16, 16)))
    with pytest.raises(ValueError, match="target must have two images or more, got 1"):
        StatisticsLoss(target[:1])


def test_smooth_fields_are_orthogonal_and_have_no_mean():
    fields = smooth_fields(16, 12, 3)
    assert fields.shape == (8, 16, 12)
    assert fields.mean((1, 2)).abs().max() < 1e-6
    gram = fields.flatten(1) @ fields.flatten(1).T
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-4)
    assert smooth_fields(8, 8, 1).shape == (0, 8, 8)


def test_an_mlp_that_starts_awake():
    mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 9))
    latent = random(256, 6)
    seeded(lambda: wake(mlp, latent, 0.5))
    assert mlp(latent).std().item() == pytest.approx(0.5, rel=1e-4)
    assert mlp(torch.zeros(1, 6)).abs().max() == 0


# -- the networks with additions -----------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_generator_with_all_additions(channels):
    generator = seeded(lambda: Generator(OURS, channels))
    images, o = random(6, channels, 8, 8).tanh(), random(6, 4)
    noise = random(6, channels, 8, 8, seed=1)
    drawn = generator(images, o, noise)
    assert drawn.shape == images.shape
    assert drawn.abs().max() <= 1
    assert torch.equal(drawn, generator(images, o, noise))
    torch.testing.assert_close(drawn[2:3], generator(images[2:3], o[2:3], noise[2:3]))
    assert not torch.equal(drawn, generator(images, o, -noise))
    one, other = (seeded(lambda: generator(images, o), seed) for seed in (1, 2))
    assert not torch.equal(one, other)  # without a map, it comes from the global generator
    assert torch.equal(one, seeded(lambda: generator(images, o), 1))
    drawn.sum().backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None] == []


def test_each_addition_by_its_definition():
    images, o, noise = random(2, 1, 8, 8).tanh() * 0.5, random(2, 4), random(2, 1, 8, 8, seed=1)
    plain = GeneratorConfig(4, 8, 4, 1, 1, 8)
    base = seeded(lambda: Generator(plain))

    def with_weights_of_base(**added):
        found = seeded(lambda: Generator(replace(plain, **added)))
        found.load_state_dict(base.state_dict(), strict=False)
        return found

    hidden, drawn = base.mlp[:-1](base.space(o)), base(images, o)
    blended = with_weights_of_base(blend=True)
    share = blended.blend(hidden).sigmoid()[:, :, None, None]
    torch.testing.assert_close(blended(images, o), (1 - share) * images + share * drawn)
    lit = with_weights_of_base(light=2)
    field = torch.einsum("nk,khw->nhw", lit.light(hidden), smooth_fields(8, 8, 2))[:, None]
    torch.testing.assert_close(lit(images, o), (drawn + field).clamp(-1, 1))
    noisy = with_weights_of_base(noise=True)
    strength = F.softplus(noisy.noise(hidden))[:, :, None, None]
    torch.testing.assert_close(noisy(images, o, noise), (drawn + strength * noise).clamp(-1, 1))


def test_a_discriminator_that_sees_residuals():
    discriminator = seeded(lambda: Discriminator(DiscriminatorConfig(4, 2, 2, residuals=True), 3))
    assert discriminator.scales[0][0].in_channels == 6
    maps = discriminator(random(2, 3, 16, 16))
    assert [tuple(each.shape) for each in maps] == [(2, 1, 4, 4), (2, 1, 2, 2)]


def test_a_predictor_can_learn_a_visible_style():
    predictor = seeded(lambda: StylePredictor(1, 2, width=8))
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    patterns = random(2, 1, 16, 16)
    for step in range(150):
        o, images = random(32, 2, seed=step), random(32, 1, 16, 16, seed=10**6 + step)
        drawn = images + (o[:, :, None, None, None] * patterns).sum(1)
        loss = F.mse_loss(predictor(drawn, images), o)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


# -- configuration -------------------------------------------------------------------------------


def test_the_paper_alone(tmp_path):
    paper = replace(load_config(), fidelity="paper")
    for table, keys in ADDITIONS.items():
        for key, off in keys.items():
            assert getattr(getattr(paper, table), key) == off
            assert getattr(getattr(load_config(), table), key) != off, f"{table}.{key} adds nothing"
    assert without(load_config(), ALL) == paper
    assert described(ALL) == 'fidelity = "paper"'
    assert additions(paper) == []
    for name in additions(load_config()):
        left = without(load_config(), name)
        assert set(additions(load_config())) - set(additions(left)) == {name}
    assert [described(name) for name in ("noise", "light", "adversarial_weight")] == [
        "noise = false",
        "light = 0",
        "adversarial_weight = 1.0",
    ]
    (tmp_path / "paper.toml").write_text('fidelity = "paper"\n[generator]\nnoise = true\n')
    assert not load_config(tmp_path / "paper.toml").generator.noise


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CfsmConfig(fidelity="full"), r"fidelity must be one of .*, got 'full'"),
        (lambda: StyleConfig(statistics_weight=1.0, batch_size=1), "batch_size must be at least 2"),
        (lambda: StyleConfig(recovery_weight=-1.0), "recovery_weight must be finite and ≥ 0"),
        (lambda: StyleConfig(seeds=0), "seeds must be at least 1, got 0"),
        (lambda: GeneratorConfig(light=-1), "light must be at least 0, got -1"),
        (lambda: GeneratorConfig(light=1), "light must be 0, or at least 2, got 1"),
        (
            lambda: GuidedConfig(originals=0.5, other_originals=(0.51,), batch_size=32),
            r"must be different numbers of originals in a batch of 32, got \(0.5, 0.51\)",
        ),
        (lambda: GuidedConfig(other_originals=(1.5,)), r"each of other_originals must be in"),
        (lambda: GuidedConfig(other_epsilons=(-0.1,)), "each of other_epsilons must be finite"),
        (
            lambda: GuidedConfig(epsilon=0.1, other_epsilons=(0.2, 0.2)),
            r"epsilon and other_epsilons must be different, got \(0.1, 0.2, 0.2\)",
        ),
        (lambda: GeneratorConfig(awake=math.nan), "awake must be finite and ≥ 0, got nan"),
    ],
)
def test_bad_configurations_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
