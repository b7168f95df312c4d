"""Transforms of a user's: the same in every run, resumable, checked, from Python and from TOML."""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synface.common.files import CheckpointError
from synface.data import (
    DataError,
    Transforms,
    embedded_faces,
    open_images,
    read_folder,
    read_transforms,
)
from synface.data.loading.sampler import RankSlice
from synface.data.mixing import Constant
from synface.training.loop import train
from synface.training.sources import FacesSource, MixedSource

from tests.helpers.command_line import call, refused
from tests.helpers.training import SMALL, TINY, folder, same, state

SMALL = replace(SMALL, augment=0.0)
SHAPE = (10, 8, 3)  # of the images in most tests


class Brightness:
    """Adds a random number to an image, drawn from one of the global generators."""

    DRAWS = {  # noqa: RUF012
        "torch": lambda: float(torch.rand(())),
        "random": random.random,
        "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    }

    def __init__(self, draw="torch", most=100):
        self.draw, self.most = self.DRAWS[draw], most

    def __call__(self, image):
        return (image.float() / 255 + self.draw() * self.most / 255).clamp(0, 1)


class Opposite:
    """Makes an image black or white."""

    def __call__(self, image):
        return torch.full_like(image, 255 * int(torch.rand(()) < 0.5))


# The same for TOML files, in a module of the user's.
MODULE = """
import torch

class Brightness:
    def __init__(self, most=100):
        self.most = most

    def __call__(self, image):
        return (image.float() / 255 + float(torch.rand(())) * self.most / 255).clamp(0, 1)

def nothing():
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Make a module `my_transforms` that can be imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_transforms.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")


def albumentations():
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    return pytest.importorskip("albumentations")


def torchvision():
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # the latter where it is of another torch build
        pytest.skip(f"torchvision cannot be imported: {error}")
    return v2


def of_albumentations():
    a = albumentations()
    return a.Compose([a.HorizontalFlip(), a.OneOf([a.GaussNoise(), a.RandomGamma()], p=0.9)])


def of_torchvision():
    v2 = torchvision()
    jitter = v2.RandomApply([v2.ColorJitter(0.5, 0.5)], p=0.9)
    return v2.Compose([v2.RandomHorizontalFlip(), jitter, v2.RandomErasing()])


KINDS = {
    "torch": Brightness,
    "random": lambda: Brightness("random"),
    "numpy": lambda: Brightness("numpy"),
    "albumentations": of_albumentations,
    "torchvision": of_torchvision,
    "several": lambda: [Brightness("numpy"), Brightness("random"), torch.Tensor.clone],
}


def images(count=16) -> torch.Tensor:
    """Return so many copies of one image."""
    one = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    return torch.from_numpy(one).repeat(count, 1, 1, 1)


def distinct(batch: torch.Tensor) -> int:
    return len({image.numpy().tobytes() for image in batch})


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "transforms.toml"
    file.write_text(text)
    return file


# -- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_its_seed(kind):
    apply = Transforms(KINDS[kind]())
    first = apply(images(), 5)
    apply(images(), 6)
    torch.rand(3), random.random()  # other draws in between have no effect
    assert torch.equal(apply(images(), 5), first)
    assert torch.equal(Transforms(KINDS[kind]())(images(), 5), first)
    assert not torch.equal(apply(images(), 6), first)
    assert distinct(first) > 8  # each image has draws of its own
    assert first.dtype == torch.uint8
    assert first.shape == (16, *SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_left_as_they_were(kind):
    apply = Transforms(KINDS[kind]())

    def states():
        legacy = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist(), legacy[2:]

    before = states()
    apply(images(), 5)
    assert states() == before
    with pytest.raises(DataError):
        Transforms([apply.transforms[0], lambda image: image[:1]])(images(), 5)
    assert states() == before


def test_generators_of_one_seed_draw_different_numbers():
    """Seeded with one integer, torch and NumPy would draw the same words."""
    drawn = []

    def draw(image):
        drawn.append(torch.randint(2**32, (50,)).tolist())
        drawn.append(np.random.randint(2**32, size=50, dtype=np.int64).tolist())  # noqa: NPY002
        drawn.append([random.getrandbits(32) for _ in range(50)])
        return image

    Transforms(draw)(images(1), 5)
    assert len({*drawn[0], *drawn[1], *drawn[2]}) == 150


def test_parts_of_an_albumentations_compose_draw_independently():
    """Its own set_random_seed would flip both ways or not at all."""
    a = albumentations()
    both = [a.HorizontalFlip(), a.VerticalFlip()]
    assert distinct(Transforms(a.Compose(both))(images(50), 0)) == 4
    assert distinct(Transforms(both)(images(50), 0)) == 4


def test_defaults_of_torch_have_no_effect():
    apply = Transforms(lambda image: image * (torch.rand(()) < 0.5))
    first = apply(images(), 5)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(apply(images(), 5), first)
    finally:
        torch.set_default_dtype(torch.float32)


# -- results -------------------------------------------------------------------------------------


def test_results_are_rounded_to_8_bits():
    every = torch.arange(240, dtype=torch.uint8).view(1, *SHAPE)
    for same_values in (
        lambda x: x.float() / 255,
        lambda x: x.double() / 255,
        lambda x: x.float().add(0.4) / 255,
        lambda x: x.float().sub(0.4) / 255,
    ):
        assert torch.equal(Transforms(same_values)(every.clone(), 0), every)
    flipped = Transforms([lambda x: x.flip(2), lambda x: x.flip(1)])(every.clone(), 0)
    assert torch.equal(flipped, every.flip(1, 2))  # of (B, H, W, C)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: x[:, :-1], r"returned uint8 \(3, 9, 8\) .* must remain .*\(3, 10, 8\)"),
        (lambda x: x[:1], r"returned uint8 \(1, 10, 8\)"),
        (lambda x: x.permute(1, 2, 0), r"returned uint8 \(10, 8, 3\)"),
        (lambda x: x.long(), r"returned int64 \(3, 10, 8\)"),
        (lambda x: None, "returned NoneType;"),
        (lambda x: x.numpy(), "returned ndarray;"),
        (lambda x: x.float(), r"returned values from 128 to 128; .* floating point in \[0, 1\]"),
        (lambda x: x.float() / 127.5 - 2, "returned values from -0.99"),
        (lambda x: x.float() * torch.nan, "returned values from nan to nan"),
        (lambda x: x.view(7), "failed: RuntimeError: shape '.7.' is invalid"),
    ],
)
def test_a_wrong_result_names_its_transform(transform, message):
    faces = embedded_faces(images_per_identity=1, size=16, identities=4)
    faces = replace(faces, images=images(len(faces)))
    with pytest.raises(DataError, match=rf"transform 2 \(<lambda>\) {message}"):
        FacesSource(faces, transform=[Brightness(most=0), transform])


def test_a_wrong_result_of_albumentations_names_its_transform():
    a = albumentations()
    with pytest.raises(DataError, match=r"transform 1 \(CenterCrop\) returned uint8 \(4, 4, 3\)"):
        Transforms(a.CenterCrop(4, 4))(images(1), 0)


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match=r"transform 2 \(str\) must be callable, got str 'flip'"):
        Transforms([Brightness(), "flip"])
    with pytest.raises(
        TypeError, match="transform must be callable, or a list of callables, got int"
    ):
        Transforms(3)
    old = type("Flip", (), {"__module__": "albumentations.augmentations", "__call__": id})
    with pytest.raises(ValueError, match=r"transform 1 \(Flip\) needs albumentations 2.0"):
        Transforms(old())


# -- training ------------------------------------------------------------------------------------


def faces(identities=12):
    return embedded_faces(images_per_identity=2, size=16, identities=identities)


@pytest.mark.parametrize("kind", ["several", "albumentations"])
def test_a_resumed_run_is_bitwise_an_uninterrupted_one(tmp_path, kind):
    def source():
        return FacesSource(faces(), transform=KINDS[kind]())

    config = replace(SMALL, augment=0.5)
    whole = train(config, source(), tmp_path / "whole")
    train(config, source(), tmp_path / "cut", stop_after=3)
    resumed = train(config, source(), tmp_path / "cut", resume=True)
    assert same(state(whole), state(resumed))
    assert whole.history == resumed.history
    assert whole.history != train(config, faces(), tmp_path / "without").history


def test_images_of_files_are_transformed_as_those_in_memory(tmp_path):
    listed = open_images(folder(tmp_path / "faces"))
    batches = [
        [batch.images.clone() for _, batch in source.batches(SMALL, 1)]
        for source in (
            FacesSource(read_folder(listed, (20, 18)), transform=Brightness()),
            FacesSource(listed, size=(20, 18), transform=Brightness(), workers=1),
        )
    ]
    assert len(batches[0]) == 3
    assert all(map(torch.equal, *batches))


def test_a_run_of_other_transforms_is_not_resumed(tmp_path):
    train(SMALL, FacesSource(faces(), transform=Brightness()), tmp_path, stop_after=1)
    for other in (None, [Brightness(), Brightness()], torch.nn.Identity()):
        with pytest.raises(
            CheckpointError, match=r"its data's transforms is '<.*Brightness object"
        ):
            train(SMALL, FacesSource(faces(), transform=other), tmp_path, resume=True)
    train(SMALL, FacesSource(faces(), transform=Brightness()), tmp_path, resume=True)


def test_a_transform_that_fails_loses_no_step(tmp_path):
    count = []

    def fails(image):
        count.append(1)
        if len(count) > 30:  # one on a gray image, then batches of 11, 11 and 2
            raise KeyError("lost")
        return image

    source = FacesSource(faces(), transform=fails)
    with pytest.raises(DataError, match=r"transform 1 \(fails\) failed: KeyError: 'lost'"):
        train(SMALL, source, tmp_path)
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_ranks_draw_different_numbers():
    one = faces()
    one = replace(one, images=images(len(one)))  # all alike, so that draws alone differ
    source, config = FacesSource(one, transform=Brightness()), replace(SMALL, batch_size=24)

    def first(part):
        return next(source.batches(config, 0, part))[1].images

    whole, left, right = first(RankSlice()), first(RankSlice(0, 2)), first(RankSlice(1, 2))
    assert torch.equal(left, whole[:12])  # the first rank's stream is that of a single process
    assert distinct(torch.cat([left, right])) > 20


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["real", "synthetic"])
def test_both_sides_of_a_mixture_are_transformed(share):
    one = faces()
    one = replace(one, images=torch.zeros(len(one), *SHAPE, dtype=torch.uint8))

    def first():
        source = MixedSource(one, one, ratio=Constant(share), transform=Brightness(), workers=1)
        return next(source.batches(SMALL, 0))[1].images

    assert distinct(first()) > 8
    assert torch.equal(first(), first())


def test_the_sides_of_a_mixture_draw_different_numbers():
    one = faces()
    one = replace(one, images=torch.zeros(len(one), *SHAPE, dtype=torch.uint8))
    halves = MixedSource(one, one, ratio=Constant(0.5), transform=Opposite(), workers=1)
    found = next(halves.batches(SMALL, 0))[1].images[:, 0, 0, 0]
    assert len(found.unique()) == 3  # with the same draws, only black and white


def test_workers_that_mix_apply_no_transforms():
    with pytest.raises(ValueError, match="it needs mix_in_workers=False"):
        MixedSource(faces(), faces(), transform=Brightness(), mix_in_workers=True)


# -- TOML ----------------------------------------------------------------------------------------


def test_a_file_gives_the_bits_of_the_objects(module, tmp_path):
    a = albumentations()
    file = written(
        tmp_path,
        """
        [[transform]]
        use = "my_transforms:Brightness"
        most = 50

        [[transform]]
        use = "albumentations:OneOf"
        p = 0.8
        transforms = [
            { use = "albumentations:HorizontalFlip", p = 1.0 },
            { use = "albumentations:GaussNoise", std_range = [0.1, 0.2] },
        ]
        """,
    )
    parts = [a.HorizontalFlip(p=1.0), a.GaussNoise(std_range=(0.1, 0.2))]
    objects = Transforms([Brightness(most=50), a.OneOf(parts, p=0.8)])
    assert torch.equal(read_transforms(file)(images(), 3), objects(images(), 3))


def test_a_file_of_torchvision_gives_the_bits_of_the_objects(tmp_path):
    v2 = torchvision()
    file = written(
        tmp_path,
        """
        [[transform]]
        use = "torchvision.transforms.v2:RandomApply"
        p = 0.8
        transforms = [{ use = "torchvision.transforms.v2:ColorJitter", brightness = [0.5, 1.5] }]

        [[transform]]
        use = "torchvision.transforms.v2:RandomErasing"
        """,
    )
    jitter = v2.RandomApply([v2.ColorJitter(brightness=(0.5, 1.5))], p=0.8)
    objects = Transforms([jitter, v2.RandomErasing()])
    for trusted in (True, False):
        assert torch.equal(read_transforms(file, trusted)(images(), 3), objects(images(), 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("use = 1", "unknown key 'use'"),
        ("", r"must list transforms as tables \[\[transform\]\]"),
        ("transform = []", r"must list transforms as tables \[\[transform\]\]"),
        ("transform = 3", r"must list transforms as tables \[\[transform\]\]"),
        ("transform = ['my_transforms:Brightness']", r"must list transforms as tables"),
        ("[[transform]]\nmost = 3", "transform 1: use must be a class as module:Name.*got None"),
        ("[[transform]]\nuse = 'Brightness'", "transform 1: use must be .*got 'Brightness'"),
        (
            "[[transform]]\nuse = 'my_transforms:Brightness'\n[[transform]]\nuse = 'no_such:Flip'",
            r"transform 2 \(no_such:Flip\) cannot be imported: No module named 'no_such'",
        ),
        (
            "[[transform]]\nuse = 'my_transforms:Darkness'",
            r"transform 1 \(my_transforms:Darkness\) cannot be imported: .*no attribute 'Darkness'",
        ),
        (
            "[[transform]]\nuse = 'my_transforms:Brightness'\nleast = 3",
            r"transform 1 \(my_transforms:Brightness\): TypeError: .* argument 'least'",
        ),
        (
            "[[transform]]\nuse = 'my_transforms:Brightness'\n"
            "most = [{ use = 'my_transforms:Brightness', least = 1 }]",
            r"transform 1 \(my_transforms:Brightness\): transform inside "
            r"\(my_transforms:Brightness\): TypeError: .* argument 'least'",
        ),
        (
            "[[transform]]\nuse = 'my_transforms:Brightness'\nmost = 2020-01-01",
            r"transform.most must be a string, boolean, number, list or table, got datetime",
        ),
        ("[[transform]]\nuse = 'my_transforms:nothing'", "must build a callable, got NoneType"),
        ("[[transform]", "is not TOML"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(module, tmp_path, text, message):
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        read_transforms(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HorizontalFlip'\nwhen = 3", r"\(albumentations:HorizontalFlip\): .*'when' are not valid"),
        ("ImageCompression'\nquality_range = [40, 900]", "ValueError: .* >= 1 and <= 100"),
        ("load'\nfilepath_or_buffer = 'x'", "is no class of albumentations"),
        ("os.system'\ncommand = 'true'", "is no class of albumentations"),
    ],
)
def test_arguments_are_those_of_albumentations(tmp_path, text, message):
    albumentations()
    file = written(tmp_path, f"[[transform]]\nuse = 'albumentations:{text}")
    with pytest.raises(ValueError, match=f"transform 1 .*{message}"):
        read_transforms(file, trusted=False)


# -- the command line ----------------------------------------------------------------------------

TINY = [*TINY, "--widths", "4,8", "--depths", "1,1", "--holdout", "2"]


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_run_uses_a_file_and_resumes_with_it(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = folder(tmp_path / "faces")
    file = written(tmp_path, "[[transform]]\nuse = 'my_transforms:Brightness'\nmost = 50")
    options = ["--data", data, *TINY, "--epochs", "2"]

    def losses(run):
        return (tmp_path / run / "metrics.jsonl").read_text()

    call("train", *options, "--output", "without")
    call("train", *options, "--output", "whole", "--transforms", "transforms.toml")
    assert losses("whole") != losses("without")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["command"][
        "transforms"
    ] == str(file)

    call("train", *options[:-1], "1", "--output", "cut", "--transforms", file)
    assert losses("cut") != losses("whole")
    shown = refused("train", "--resume", "cut", "--epochs", "2")
    assert f"give --transforms {file}, if you trust it" in shown
    moved = file.rename(tmp_path / "moved.toml")
    shown = refused("train", "--resume", "cut", "--epochs", "2")
    assert f"its transforms (--transforms) are no longer at {file}: give their path with" in shown
    shown = refused("train", "--resume", "without", "--transforms", moved)
    assert "differs from the run's None" in shown
    moved.write_text(moved.read_text().replace("50", "60"))
    shown = refused("train", "--resume", "cut", "--epochs", "2", "--transforms", moved)
    assert re.search(r"its data's transforms is '.*most = 50 .*', expected '.*most = 60 ", shown)
    moved.write_text(moved.read_text().replace("60", "50") + "\n# the same\n")
    call("train", "--resume", "cut", "--epochs", "2", "--transforms", moved)
    call("eval", "cut")
    found = json.loads((tmp_path / "cut" / "config.json").read_text())["command"]
    assert found["transforms"] == str(moved)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_resumed_run_reads_its_file_of_a_known_library(tmp_path):
    albumentations()
    data = folder(tmp_path / "faces")
    file = written(tmp_path, "[[transform]]\nuse = 'albumentations:HorizontalFlip'")
    run = tmp_path / "run"
    call("train", "--data", data, *TINY, "--output", run, "--transforms", file)
    call("train", "--resume", run, "--epochs", "2")
    mixed = ["--synthetic", data, "--real", folder(tmp_path / "real", seed=1), "--workers", "1"]
    call("train", *mixed, *TINY, "--output", tmp_path / "mixed", "--transforms", file)


def test_a_transform_of_another_size_ends_before_training(tmp_path):
    albumentations()
    text = "[[transform]]\nuse = 'albumentations:RandomCrop'\nheight = 8\nwidth = 8"
    file, run = written(tmp_path, text), tmp_path / "run"
    shown = refused(
        "train", "--data", folder(tmp_path / "faces"), *TINY, "--output", run, "--transforms", file
    )
    assert f"{file}: transform 1 (albumentations:RandomCrop) returned uint8 (8, 8, 1)" in shown
    assert not run.exists()
