"""Similarity transforms, the template, and the warping of images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.data import astronaut
from skimage.transform import SimilarityTransform, estimate_transform, warp
from synface.alignment import align, similarity, template
from synface.alignment.transform import apply, invert, to_pillow
from synface.data import DataError

ARCFACE = [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655)]
ARCFACE += [(70.7299, 92.2041)]


def dots(points, size, radius):
    """Return an image (H, W) of soft dots."""
    y, x = np.mgrid[: size[0], : size[1]]
    away = [(x - a) ** 2 + (y - b) ** 2 for a, b in points]
    return np.round(255 * np.exp(-np.array(away) / (2 * radius**2)).max(0)).astype(np.uint8)


def centroid(pixels, point, radius):
    """Return the center of gravity of an image near a point."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    near = (x - point[0]) ** 2 + (y - point[1]) ** 2 < radius**2
    weights = np.where(near, pixels, 0).astype(float)
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_known_similarity_is_found(seed):
    random = np.random.default_rng(seed)
    points = random.uniform(0, 500, (5, 2))
    angle, scale = random.uniform(-np.pi, np.pi), random.uniform(0.1, 10)
    known = SimilarityTransform(scale=scale, rotation=angle, translation=random.normal(0, 99, 2))
    found = similarity(points, known(points))
    np.testing.assert_allclose(found, known.params[:2], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(apply(invert(found), apply(found, points)), points, atol=1e-8)


def test_noisy_points_are_fitted_as_by_umeyama():
    random = np.random.default_rng(0)
    points = random.uniform(0, 500, (5, 2))
    target = template() + random.normal(0, 3, (5, 2))
    expected = estimate_transform("similarity", points, target)
    np.testing.assert_allclose(similarity(points, target), expected.params[:2], atol=1e-9)


def test_nothing_is_mirrored():
    mirrored = template() * [-1, 1]
    assert np.linalg.det(similarity(mirrored, template())[:, :2]) > 0


def test_the_template_is_arcfaces_and_scales():
    np.testing.assert_allclose(template(), ARCFACE, atol=1e-12)
    np.testing.assert_allclose(template((112, 96)), np.array(ARCFACE) - [8, 0], atol=1e-12)
    np.testing.assert_allclose(template((224, 224)), (np.array(ARCFACE) + 0.5) * 2 - 0.5)
    np.testing.assert_allclose(template((224, 224), 0.5), np.array(ARCFACE) + 56, atol=1e-12)


@pytest.mark.parametrize("size", [(112, 112), (112, 96), (160, 224)])
@pytest.mark.parametrize(("scale", "degrees"), [(0.4, 10), (1, 0), (1, -35), (2.5, 90), (7, 180)])
def test_landmarks_land_on_the_template(size, scale, degrees):
    """The dots of a photo in which the face has this scale and rotation."""
    there = SimilarityTransform(scale=scale, rotation=np.deg2rad(degrees))
    low = there([(0, 0), (112, 0), (0, 112), (112, 112)]).min(0) - [20, 10]
    landmarks = there(np.array(ARCFACE)) - low
    side = int(170 * scale) + 40
    radius = max(2.0, 2.5 * scale)
    crop = align(dots(landmarks, (side, side), radius), landmarks, size, grayscale=True)
    assert crop.shape == (*size, 1)
    for point in template(size):
        inside = (point > 0).all() and (point < size[::-1]).all()
        if inside:
            found = centroid(crop[..., 0], point, 8)
            np.testing.assert_allclose(found, point, atol=0.15)


def test_pixels_are_those_of_another_library():
    image = ndimage.gaussian_filter(astronaut(), (2, 2, 0))
    turned = SimilarityTransform(scale=1.3, rotation=0.3, translation=(150, 40))
    landmarks = turned(np.array(ARCFACE))
    crop = align(image, landmarks, (112, 112))
    expected = warp(image, turned, output_shape=(112, 112), order=3, preserve_range=True)
    assert np.abs(crop[2:-2, 2:-2] - expected[2:-2, 2:-2]).mean() < 1


@pytest.mark.parametrize("scale", [4, 9.5])
def test_large_photos_do_not_alias(scale):
    """A pattern too fine for the crop becomes gray."""
    y, x = np.mgrid[: int(112 * scale), : int(112 * scale)]
    pattern = ((x // 2 + y // 2) % 2 * 255).astype(np.uint8)
    crop = align(pattern, np.array(ARCFACE) * scale, grayscale=True)[4:-4, 4:-4]
    assert abs(crop.mean() - 127.5) < 3
    assert crop.std() < 6


def test_what_the_photo_does_not_reach_is_black():
    crop = align(np.full((60, 200, 3), 200, np.uint8), ARCFACE)
    assert (crop[:59] == 200).all()
    assert not crop[61:].any()
    far = align(np.full((60, 60), 200, np.uint8), np.array(ARCFACE) * 4 + 2000)
    assert not far.any()


def test_images_are_taken_in_any_form():
    pixels = astronaut()[:200, 150:300]
    points = np.array(ARCFACE) + 10
    crop = align(pixels, points)
    assert crop.shape == (112, 112, 3)
    photo = Image.fromarray(pixels)
    assert (align(photo, points) == crop).all()
    assert to_pillow(photo) is photo  # a copy may take 300 MB
    gray = pixels[..., 0]
    assert (align(gray, points) == align(gray[..., None], points)).all()
    assert align(gray, points, grayscale=True).shape == (112, 112, 1)


@pytest.mark.parametrize("order", [[1, 0, 2, 4, 3], [1, 0, 2, 3, 4], [0, 1, 2, 4, 3]])
def test_landmarks_in_another_order_are_refused(order):
    """A similarity transform onto them would shrink the photo to a few pixels."""
    points = np.array(ARCFACE)[order] + 10
    with pytest.raises(DataError, match=r"order left eye, right eye, nose.*left in the photo"):
        align(astronaut(), points)


@pytest.mark.parametrize("width", [1, 0.3, 0.1])
def test_faces_in_profile_are_aligned(width):
    middle = np.mean(ARCFACE, axis=0)
    points = (
        (np.array(ARCFACE) - middle) * [width, 1]
        + middle
        + [[0, 0], [0, 0], [20, 0], [0, 0], [0, 0]]
    )
    assert align(astronaut(), points).any()


@pytest.mark.parametrize(
    ("error", "message", "image", "points", "options"),
    [
        (TypeError, "got an array of float64", np.zeros((9, 9)), ARCFACE, {}),
        (TypeError, "got list", [[0]], ARCFACE, {}),
        (OSError, "8 bits per channel .mode I;16.", Image.new("I;16", (9, 9)), ARCFACE, {}),
        (OSError, "8 bits per channel .mode F.", Image.new("F", (9, 9)), ARCFACE, {}),
        (ValueError, r"got \(2, 9, 9\)", np.zeros((2, 9, 9), np.uint8), ARCFACE, {}),
        (ValueError, r"shape \(4, 2\)", np.zeros((9, 9), np.uint8), ARCFACE[:4], {}),
        (ValueError, "finite pixel", np.zeros((9, 9), np.uint8), np.full((5, 2), np.nan), {}),
        (ValueError, "5 different", np.zeros((9, 9), np.uint8), np.ones((5, 2)), {}),
        (ValueError, "size must be", np.zeros((9, 9), np.uint8), ARCFACE, {"size": (0, 5)}),
        (ValueError, "size must be", np.zeros((9, 9), np.uint8), ARCFACE, {"size": 112}),
        (ValueError, "margin must be", np.zeros((9, 9), np.uint8), ARCFACE, {"margin": -1.0}),
    ],
)
def test_what_cannot_be_aligned_is_refused(error, message, image, points, options):
    with pytest.raises(error, match=message):
        align(image, points, **options)
