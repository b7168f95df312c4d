"""The generator of 3D heads: its controls, bits, sizes and colors."""

import pytest
import torch
import torch.nn.functional as F
from synface.evaluation.embedding import pixel_embeddings
from synface.evaluation.metrics import verify
from synface.synthesis import HeadGenerator, Vary
from synface.synthesis.heads.exact import bell, exponential, ramp

from tests.helpers.generators import arguments, unit


@pytest.fixture(scope="module")
def heads():
    return HeadGenerator(32, 48)


def drawn(generator, style, who=0, count=12):
    """Return images (B, H, W) float64 of several identities in one style."""
    people = unit(count, generator.embedding_size, seed=who)
    images = generator.generate(people, style.expand(count, -1), torch.zeros(count).long())
    return images[..., 0].double()


def style_of(generator, control=None, number=0, value=0.0):
    style = torch.zeros(1, generator.style_size)
    if control:
        style[0, generator.controls[control][number]] = value
    return style


def coverage(generator, style):
    """Return (B, H, W) in [0, 1]: how little each pixel changes with the background."""
    dark, bright = style.clone(), style.clone()
    column = generator.controls["background"][0]
    dark[:, column], bright[:, column] = -4.0, 4.0
    change = drawn(generator, bright) - drawn(generator, dark)
    return 1.0 - change / change.max()


def silhouette(generator, style):
    return coverage(generator, style) > 0.5


@pytest.fixture(scope="module")
def neutral(heads):
    """Images in the style of zeros and their coverage, which no test changes."""
    style = style_of(heads)
    return drawn(heads, style), coverage(heads, style)


EXTREMES = [
    (control, number, sign * 2.2)
    for control, count in (
        ("expression", 6), ("pose", 3), ("light", 4), ("placement", 3), ("background", 3),
        ("sensor", 2),
    )
    for number in range(count)
    for sign in (-1, 1)
]  # fmt: skip


def test_the_controls_share_out_the_style(heads):
    columns = [column for each in heads.controls.values() for column in each]
    assert columns == list(range(heads.style_size))
    assert list(heads.controls) == [
        "expression", "pose", "light", "placement", "background", "sensor"
    ]  # fmt: skip
    assert {name: len(each) for name, each in heads.numbers.items()} == {
        name: len(each) for name, each in heads.controls.items()
    }


@pytest.mark.parametrize(("control", "number", "value"), EXTREMES)
def test_each_control_does_what_its_name_says_and_leaves_the_others_alone(
    heads, neutral, control, number, value
):
    style = style_of(heads, control, number, value)
    images, covered = neutral
    change = (drawn(heads, style) - images).abs()
    one_way = {  # numbers that act in one direction alone, and hue, which is invisible in gray
        ("expression", 1), ("expression", 3), ("expression", 4), ("sensor", 0), ("sensor", 1),
    }  # fmt: skip
    if (control, number) == ("background", 2) or ((control, number) in one_way and value < 0):
        assert change.max() == 0
        return
    moved = ((coverage(heads, style) > 0.5) ^ (covered > 0.5)).double().mean()
    inside, outside = change[covered > 0.99].mean(), change[covered < 0.01].mean()
    assert change.mean() > 0.05
    if control in ("pose", "placement"):
        assert moved > 0.005, "moves the silhouette"
    elif control == "expression":
        assert moved < 0.02, "leaves the silhouette, but for the jaw"
    elif control == "sensor":
        assert moved < 0.02, "leaves the silhouette, but for its edge"
    elif control == "light":
        assert moved == 0, "leaves the silhouette"
    if control == "background":
        assert inside == 0, "leaves the face"
        assert outside > 5
    if control == "light":
        assert inside > 1
        assert outside == 0, "leaves the background"


REGIONS = ("mouth", "mouth", "eyes", "eyes", "mouth", "eyes")


@pytest.mark.parametrize(("number", "region"), list(enumerate(REGIONS)))
def test_an_expression_moves_its_region_most(heads, neutral, number, region):
    style = style_of(heads, "expression", number, 2.2)
    change = (drawn(heads, style) - neutral[0]).abs().mean(0)
    rows = {"eyes": slice(15, 27), "mouth": slice(31, 44)}
    across = slice(12, 36)
    found = {name: float(change[each, across].mean()) for name, each in rows.items()}
    other = "mouth" if region == "eyes" else "eyes"
    assert found[region] > 2.5 * found[other]
    assert found[region] > 4 * float(change[:6].mean()), "more than the hair"


def test_light_comes_from_where_its_azimuth_says(heads):
    left, right = (
        drawn(heads, style_of(heads, "light", 0, value))[:, 12:40] for value in (-2.0, 2.0)
    )
    half = left.shape[2] // 2
    assert (left[..., :half].mean() - left[..., half:].mean()) > 10
    assert (right[..., half:].mean() - right[..., :half].mean()) > 10


def test_yaw_turns_the_nose_and_placement_shifts_the_head(heads):
    def middle(style):  # of the silhouette, in pixels from the image's left
        weight = silhouette(heads, style).double()
        return float((weight.sum((0, 1)) * torch.arange(48)).sum() / weight.sum())

    at = middle(style_of(heads))
    assert at == pytest.approx(23.5, abs=0.5)
    assert middle(style_of(heads, "placement", 1, 2.0)) - at == pytest.approx(48 * 0.05, abs=0.6)
    sizes = [
        silhouette(heads, style_of(heads, "placement", 0, z)).double().mean() for z in (-2, 0, 2)
    ]
    assert sizes == sorted(sizes)
    turned = [drawn(heads, style_of(heads, "pose", 0, z)).mean(0) for z in (-2.0, 2.0)]
    mirrored = float((turned[0] - turned[1].flip(1)).abs().mean())
    assert mirrored < 0.3 * float((turned[0] - turned[1]).abs().mean())


@pytest.mark.parametrize(("dim", "size", "channels"), [(2, 8, 1), (16, 33, 3), (512, 32, 1)])
def test_an_image_depends_on_its_own_arguments_alone(dim, size, channels):
    generator = HeadGenerator(dim, size, channels)
    embedding, style, seed = arguments(19, dim, generator.style_size)
    images = generator.generate(embedding, style, seed)
    assert images.dtype == torch.uint8
    assert images.shape == (19, size, size, channels)
    assert images.is_contiguous() or channels > 1
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for rows in ([3], [1, 2, 3, 4, 5], list(range(18, -1, -1))):
        again = generator.generate(embedding[rows], style[rows], seed[rows])
        assert torch.equal(again, images[rows])
    try:
        torch.set_num_threads(3)
        assert torch.equal(
            HeadGenerator(dim, size, channels).generate(embedding, style, seed), images
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    style[:, generator.controls["sensor"][1]] = 1.0
    noisy = generator.generate(embedding, style, seed)
    assert not torch.equal(generator.generate(embedding, style, seed + 1), noisy)


def test_styles_that_are_extreme_or_zero_rows_are_images_too(heads):
    style = torch.full((2, heads.style_size), 1e30)
    style[1] = -1e30
    images = heads.generate(unit(2, 32), style, torch.zeros(2).long())
    assert images.float().std() > 1


def test_color_has_the_luminance_of_gray():
    gray, color = HeadGenerator(16, 40), HeadGenerator(16, 40, 3)
    embedding, _, seed = arguments(12, 16, 1)
    style = torch.zeros(12, gray.style_size)
    one = gray.generate(embedding, style, seed)[..., 0].double()
    rgb = color.generate(embedding, style, seed).double()
    assert (rgb[..., 0] - rgb[..., 2]).abs().mean() > 8, "skin is redder than it is blue"
    luma = rgb @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    # Exposure compresses each channel by itself, and repeated painting mixes colors.
    assert (luma - one).abs().mean() < 6


def test_a_random_identity_has_numbers_of_unit_variance():
    for dim in (2, 16, 90, 91, 200):
        numbers = unit(20_000, dim).double() @ HeadGenerator(dim, 8)._rotation
        assert numbers.std(0).min() > 0.9
        assert numbers.std(0).max() < 1.1


def test_embeddings_further_apart_show_faces_further_apart():
    generator = HeadGenerator(64, 32)
    a, b = unit(60, 64), unit(60, 64, seed=9)
    still, seed = torch.zeros(60, generator.style_size), torch.zeros(60).long()
    shown = generator.generate(a, still, seed).double()
    distance = []
    for share in (0.1, 0.3, 1.0):
        other = generator.generate(F.normalize(torch.lerp(a, b, share)), still, seed).double()
        distance.append(float((other - shown).abs().mean()))
    assert distance == sorted(distance)
    assert distance[-1] > 20


@pytest.mark.slow
def test_raw_pixels_recognize_people_less_the_more_is_varied():
    generator = HeadGenerator(64, 32)
    who = torch.arange(40).repeat_interleave(6)
    style = torch.randn(240, generator.style_size, generator=torch.Generator().manual_seed(3))
    aucs = []
    for strength in (0.0, 0.5, 1.0):
        varied = Vary(generator, dict.fromkeys(generator.controls, strength))
        images = varied.generate(unit(40, 64)[who], style, torch.arange(240))
        aucs.append(verify(pixel_embeddings(images), who).auc)
    assert aucs[0] == 1.0
    assert aucs == sorted(aucs, reverse=True)
    assert 0.55 < aucs[-1] < 0.9, "hard for pixels, and not hopeless"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "embedding_size must be at least 2, got 1"),
        ((8, 7), "size must be at least 8 pixels, got 7"),
        ((8, 32, 2), "channels must be 1 or 3, got 2"),
        ((8, 32, True), "channels must be 1 or 3, got True"),
        ((8, 32, 1, "cuda:99"), "cuda:99"),
    ],
)
def test_arguments_that_are_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadGenerator(*arguments)


def test_a_size_that_is_no_integer():
    with pytest.raises(TypeError, match=r"size must be an integer .*8\.5"):
        HeadGenerator(8, 8.5)
    with pytest.raises(TypeError, match="embedding_size must be an integer ≥ 2"):
        HeadGenerator("8")


def test_inputs_that_require_gradients(heads):
    embedding, style, seed = arguments(2, 32, heads.style_size)
    images = heads.generate(embedding.requires_grad_(), style.requires_grad_(), seed)
    assert torch.equal(images, heads.generate(embedding.detach(), style.detach(), seed))


def test_a_style_of_another_size(heads):
    embedding, _, seed = arguments(3, 32, 1)
    with pytest.raises(ValueError, match=r"style must be float32 of shape \(3, 21\).*\(3, 10\)"):
        heads.generate(embedding, torch.zeros(3, 10), seed)


def test_functions_that_stand_for_exponentials_are_near_them():
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert (bell(x) - torch.exp(-0.5 * x * x)).abs().max() < 0.08
    assert (exponential(x[20:81]) / torch.exp(x[20:81]) - 1).abs().max() < 0.12
    assert ramp(x, -1.0, 1.0).diff().min() >= 0
