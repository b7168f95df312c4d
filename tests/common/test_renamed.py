"""Names of the last release still work in this one, with a DeprecationWarning."""

import importlib

import pytest
import torch
from synface.data import ImageLoader, TwoDomainLoader, embedded_faces, normalize, read_folder
from synface.data.formats import decode, images
from synface.data.formats.image_set import LabeledImages, common_shape
from synface.data.loading.sampler import RankSlice
from synface.training.sources import FacesSource, MixedSource

from tests.helpers.images import folder

NORMALIZE, GRAY = "normalise", "grey"  # codespell:ignore normalise,grey


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("synface.data", NORMALIZE, normalize),
        ("synface.data.loading.augment", NORMALIZE, normalize),
        ("synface.data.formats.decode", GRAY.upper(), decode.GRAYSCALE),
        ("synface.data.formats.images", "Names", images.PackedPaths),
        ("synface.data.formats.images", "Spans", images.FileRanges),
        ("synface.data.formats.images", "Listed", images.ScanResult),
        ("synface.data.loading.sampler", "Part", RankSlice),
        ("synface.data.loading.loader", "Domain", LabeledImages),
    ],
)
def test_functions_and_classes(module, old, new):
    note = f"{old} is .* the old name goes with the next release"
    with pytest.warns(DeprecationWarning, match=note) as warned:
        assert getattr(importlib.import_module(module), old) is new
    assert warned[0].filename == __file__  # where the default filter would show it, in a script


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("augment", NORMALIZE),
        ("folder", "Faces"),
        ("folder", "DataError"),
        ("imagefolder", "list_folder"),
        ("images", "ImageSet"),
        ("images", "open_images"),
        ("images", "Names"),
        ("order", "Part"),
    ],
)
def test_modules_of_the_last_release_have_their_names(module, name):
    assert callable(getattr(importlib.import_module(f"synface.data.{module}"), name))


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match=r"images' has no attribute 'Nothing'"):
        images.Nothing  # noqa: B018


def test_the_old_keyword_is_grayscale(tmp_path):
    root = folder(tmp_path / "faces", 2, 2, seed=1)
    faces = embedded_faces(2, 16, identities=3)
    note = f"{GRAY}= of .* is grayscale= now"
    with pytest.warns(DeprecationWarning, match=note):
        assert read_folder(root, **{GRAY: False}).images.shape[3] == 3
    with pytest.warns(DeprecationWarning, match=note):
        assert common_shape([faces], None, **{GRAY: True}) == (16, 16, 1)
    size = {"size": (16, 16)}
    with (
        pytest.warns(DeprecationWarning, match=note),
        ImageLoader(root, 2, **{GRAY: False}, workers=1, **size) as images_loader,
    ):
        assert images_loader.image_shape == (16, 16, 3)
    with (
        pytest.warns(DeprecationWarning, match=note),
        TwoDomainLoader(root, root, 2, **{GRAY: False}, workers=1, **size) as pairs_loader,
    ):
        assert pairs_loader.image_shape == (16, 16, 3)
    with pytest.warns(DeprecationWarning, match=note):
        assert FacesSource(faces, **{GRAY: True}).image_shape == (16, 16, 1)
    with pytest.warns(DeprecationWarning, match=note):
        assert MixedSource(faces, faces, **{GRAY: True}).image_shape == (16, 16, 1)
    with (
        pytest.warns(DeprecationWarning, match=note),
        pytest.raises(TypeError, match=f"read_folder got both {GRAY}= and grayscale="),
    ):
        read_folder(root, **{GRAY: False}, grayscale=False)
    assert torch.equal(faces.images, read_folder(faces).images)
