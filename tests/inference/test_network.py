"""A loaded network embeds every kind of image as the evaluation does, and refuses the others."""

import copy

import numpy as np
import pytest
import synface
import torch
from PIL import Image
from synface.data import open_images, read_folder
from synface.evaluation.embedding import embed_store
from synface.inference import FaceNetwork
from synface.training.loop import train
from torch import nn

from tests.helpers.images import folder
from tests.helpers.training import SMALL

SIZE = (20, 18)
KINDS = ("L", "RGB")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Write images of several sizes, gray and in color."""
    root = tmp_path_factory.mktemp("faces")
    return {mode: folder(root / mode, 3, 4, 0, mode) for mode in KINDS}


@pytest.fixture(scope="module")
def runs(faces, tmp_path_factory):
    """Train a network on images of each color."""
    root = tmp_path_factory.mktemp("runs")
    for mode, path in faces.items():
        train(SMALL, read_folder(path, SIZE), root / mode)
    return root


@pytest.fixture(scope="module")
def networks(runs):
    return {mode: synface.load(runs / mode) for mode in KINDS}


@pytest.fixture(params=KINDS)
def mode(request):
    return request.param


def paths(root):
    return sorted(root.glob("p*/*.png"))


def test_a_run_is_loaded_as_a_module(runs, networks, mode):
    network = networks[mode]
    assert isinstance(network, FaceNetwork)
    assert not network.training
    assert network.image_shape == (*SIZE, len(mode))
    assert (network.embedding_size, network.flip) == (16, True)
    assert network.description == {
        "source": str(runs / mode), "step": 4, "backbone": "iresnet",
        "widths": [4, 8], "depths": [1, 1],
    }  # fmt: skip
    assert f"image_shape=(20, 18, {len(mode)})" in repr(network)
    backbone = network.backbone.state_dict()
    assert network.state_dict().keys() == {f"backbone.{name}" for name in backbone}
    assert sum(p.requires_grad for p in network.parameters()) > 5
    step = next((runs / mode / "checkpoints").iterdir())
    assert synface.load(str(step)).description["step"] == int(step.name.removeprefix("step-"))


def test_importing_synface_does_not_import_torch():
    from tests.cli.test_cli_start import python

    done = python("import sys, synface; print('torch' in sys.modules)")
    assert (done.stdout, done.stderr) == (b"False\n", b"")
    with pytest.raises(AttributeError, match="'synface' has no attribute 'store'"):
        _ = synface.store


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("flip", [True, False])
def test_files_of_any_size_and_color_embed_to_the_bits_of_the_evaluation(
    faces, runs, mode, other, flip
):
    network = synface.load(runs / mode, flip=flip)
    images = open_images(faces[other])
    options = {"flip": flip, "resize": True, "batch_size": 5}
    expected = embed_store(network.backbone, images.store, network.image_shape, **options)
    assert expected.shape == (12, 16)
    assert torch.equal(network.embed(images, batch_size=5), expected)
    assert torch.equal(network.embed(images.store, batch_size=5), expected)
    files = paths(faces[other])
    assert torch.equal(network.embed(files, batch_size=5), expected)
    assert torch.equal(network.embed(map(str, files), batch_size=5), expected)


def test_all_kinds_of_one_image_embed_alike(faces, networks, mode):
    network, file = networks[mode], paths(faces[mode])[5]
    expected = network.embed(file)
    assert torch.allclose(expected.norm(dim=1), torch.ones(1), atol=1e-6)
    with Image.open(file) as image:
        assert torch.equal(network.embed(image), expected)
        array = np.array(image)  # (H, W) or (H, W, C)
    kinds = [
        array,
        torch.from_numpy(array),
        np.float32(array / 255),
        array.astype(np.float64) / 255,
    ]
    if mode == "RGB":
        kinds += [array.transpose(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1).float() / 255]
    else:
        kinds += [array[..., None], array[None]]
    for kind in kinds:
        assert torch.equal(network.embed(kind), expected)
    together = network.embed([file, Image.open(file), *kinds], batch_size=1)
    assert torch.equal(together, expected.expand(len(kinds) + 2, -1))


def test_batches_of_tensors_give_the_same_bits_in_each_layout_and_dtype(faces, networks, mode):
    network = networks[mode]
    images = read_folder(faces[mode], SIZE).images
    expected = network.embed(open_images(faces[mode]))
    assert torch.equal(network.embed(images), expected)
    assert torch.equal(network.embed(images.numpy().transpose(0, 3, 1, 2)), expected)
    with torch.no_grad():
        for each in (images, images.permute(0, 3, 1, 2)):
            for typed in (each, each.float() / 255, each.double() / 255):
                assert torch.equal(network(typed), expected)
    assert torch.equal(network(images, layout="NHWC").detach(), expected)


def test_images_are_resized_and_converted_as_pillow_does(faces, networks):
    with Image.open(paths(faces["RGB"])[0]) as image:
        small = image.convert("L").resize(SIZE[::-1], Image.Resampling.BILINEAR)
        network = networks["L"]
        assert torch.equal(network.embed(image), network.embed(np.array(small)))
        assert not torch.equal(network.embed(image), network.embed(np.array(image)[2:]))


def test_a_pil_image_is_turned_by_its_orientation_and_stays_as_it_is(faces, networks, tmp_path):
    with Image.open(paths(faces["L"])[0]) as image:
        upright = image.copy()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    network = networks["L"]
    with Image.open(tmp_path / "turned.png") as turned:
        found = network.embed([turned, tmp_path / "turned.png", upright])
        assert turned.getexif()[0x0112] == 6
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_progress_and_bad_images(faces, networks, tmp_path):
    files = paths(faces["L"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixed = [files[0], tmp_path / "bad.png", *files[1:3], tmp_path / "gone.png"]
    network, seen, bad = networks["L"], [], {}
    found = network.embed(mixed, batch_size=2, bad=bad, progress=lambda *at: seen.append(at))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert bad.keys() == {1, 4}
    assert "not a readable image" in bad[1]
    assert torch.allclose(found, network.embed(files[:3]), atol=1e-6)
    with pytest.raises(
        ValueError, match=r"2 of 2 images cannot be used(.|\n)*gone\.png: not a reg"
    ):
        network.embed(mixed[1::3], bad={})
    with pytest.raises(ValueError, match=r"bad\.png: not a readable image"):
        network.embed(mixed)


def test_a_network_is_differentiable_and_exportable(faces, networks):
    network = copy.deepcopy(networks["RGB"]).train()
    images = (read_folder(faces["RGB"], SIZE).images.float() / 255).requires_grad_()
    network(images).square()[:, 0].sum().backward()
    assert images.grad.abs().max() > 0
    assert network.backbone.stem[0].weight.grad.abs().max() > 0
    network.eval()
    images = read_folder(faces["RGB"], SIZE).images
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(network, (images,), dynamic_shapes=any_batch)
    assert torch.equal(program.module()(images[:5]), network(images[:5]))


def small(shape=(4, 6, 3)):
    return FaceNetwork(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), shape, 5)


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "layout", "message"),
    [
        (u8(2, 4, 6, 1), None, r"\(N, 4, 6, 3\) or \(N, 3, 4, 6\), got uint8 \(2, 4, 6, 1\)"),
        (u8(2, 6, 4, 3), None, r"got uint8 \(2, 6, 4, 3\); the method embed resizes"),
        (u8(4, 6, 3), None, r"got uint8 \(4, 6, 3\)"),
        (u8(2, 4, 6, 3), "NCHW", r"of shape \(N, 3, 4, 6\), got"),
        (u8(2, 4, 6, 3), "HWC", "layout must be 'NHWC' or 'NCHW', got 'HWC'"),
        (u8(2, 4, 6, 3).long(), None, r"uint8 or floating point, got int64 \(2, 4, 6, 3\)"),
        (
            torch.full((2, 4, 6, 3), 255.0),
            None,
            r"must lie in \[0, 1\], got values from 255 to 255",
        ),
        (torch.full((2, 4, 6, 3), -0.1), None, "got values from -0.1 to -0.1; uint8 images"),
        (torch.full((2, 4, 6, 3), float("nan")), None, "from nan to nan"),
    ],
)
def test_forward_refuses_other_tensors(images, layout, message):
    with pytest.raises(ValueError, match=message):
        small()(images, layout)


def test_forward_refuses_other_types_and_an_ambiguous_layout():
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray; the method embed takes"):
        small()(np.zeros((2, 4, 6, 3), np.uint8))
    network, images = small((3, 3, 3)), torch.rand(2, 3, 3, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3, 3\) may be NHWC or NCHW: give layout="):
        network(images)
    last = network(images, layout="NHWC")
    assert not torch.equal(network(images, layout="NCHW"), last)
    assert torch.equal(network(images.permute(0, 3, 1, 2), layout="NCHW"), last)
    assert small()(u8(0, 4, 6, 3)).shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        ([], ValueError, "at least one image, got none"),
        (3, TypeError, "images must be paths, PIL images, arrays, tensors, or a set.* got int"),
        (["a.png", 3], TypeError, r"images\[1\] must be a path, PIL image, .* got int"),
        (np.zeros((9, 9), bool), ValueError, r"uint8 or floating point, got bool \(9, 9\)"),
        (np.zeros((9, 9, 4), np.uint8), ValueError, r"1 or 3 channels on the first or last axis"),
        (np.zeros((0, 9), np.uint8), ValueError, r"must not be empty, got uint8 \(0, 9\)"),
        (np.zeros(9, np.uint8), ValueError, r"one image, .* got uint8 \(9,\)"),
        ([u8(2, 9, 9, 3)], ValueError, r"images\[0\] must be one image"),
        (u8(3, 9, 3), ValueError, r"\(3, 9, 3\) may have its channels first or last: give layout="),
        ([np.full((9, 9), 2.0)], ValueError, r"images\[0\] of floating point must lie in \[0, 1\]"),
        (Image.new("I", (9, 9)), ValueError, r"image 0: more than 8 bits per channel \(mode I\)"),
        ("gone.png", ValueError, r"gone\.png: not a regular file"),
        (".", ValueError, "not a regular file"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Image.Image) else str(value),
)
def test_embed_refuses_what_is_no_image(networks, images, kind, message):
    with pytest.raises(kind, match=message):
        networks["RGB"].embed(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 4, 6, 1)])
def test_gray_images_reach_the_network_with_the_strides_of_nchw(dtype, shape):
    seen = []

    class Seeing(torch.nn.Module):
        def forward(self, x):
            seen.append(x.stride())
            return x.flatten(1)

    network = FaceNetwork(Seeing(), (4, 6, 1), 24)
    network(torch.zeros(shape).to(dtype))
    assert seen == [(24, 24, 6, 1)] * 2  # the image, and the flipped one


def test_a_layout_settles_where_the_channels_are(networks):
    image = torch.rand(3, 9, 3)
    network = networks["RGB"]
    first, last = (network.embed(image, layout=name) for name in ("NCHW", "NHWC"))
    assert not torch.equal(first, last)
    assert torch.equal(network.embed(image.permute(1, 2, 0), layout="NHWC"), first)
    with pytest.raises(ValueError, match="channels on the last axis"):
        network.embed(torch.rand(3, 9, 9), layout="NHWC")


def test_load_refuses_what_is_no_run_and_no_device(runs, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        synface.load(tmp_path)
    with pytest.raises(ValueError, match="device must be one that torch has here"):
        synface.load(runs / "L", device="cuda:77")
    with pytest.raises(ValueError, match="is of another model"):
        synface.load(runs / "L", backbone=nn.Sequential(nn.Flatten(), nn.Linear(360, 16)))
