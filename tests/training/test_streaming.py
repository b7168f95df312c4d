"""Training on images decoded on demand gives the same bits as training in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synface import checkpoint
from synface.data import DataError, ImageLoader, convert, open_images, read_folder
from synface.data.loading.sampler import WHOLE, RankSlice, ShuffledOrder
from synface.training.loop import TIMING, TrainConfig, train
from synface.training.sources import FacesSource

from synface_kernels.testing import status
from tests.helpers.command_line import call
from tests.helpers.forked import numbers_of
from tests.helpers.training import SMALL, score

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need a POSIX system")

SIZE = (16, 14)
SMALL = replace(SMALL, epochs=3, batch_size=5)  # 12 images: batches of 5, 5 and 2


def folder(root: Path, each: int) -> Path:
    """Write PNG files of four people, of differing sizes, some in color."""
    random = np.random.default_rng(0)
    for person in range(4):
        (root / f"p{person}").mkdir(parents=True)
        for i in range(each):
            shape = (20 + i, 18 + person, 3)[: 2 + person % 2]
            pixels = random.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(root / f"p{person}" / f"{i}.png")
    return root


@pytest.fixture
def people(tmp_path) -> Path:
    return folder(tmp_path / "people", 3)


def streamed(path: Path, **options) -> FacesSource:
    return FacesSource(open_images(path), **{"size": SIZE, "workers": 1} | options)


def taken(source: FacesSource, first: int = 0, part: RankSlice = WHOLE) -> list[tuple]:
    batches = source.batches(replace(SMALL, augment=1.0), first, part)
    return [(step, batch.images.clone(), batch.target) for step, batch in batches]


def assert_same(a: list[tuple], b: list[tuple]) -> None:
    assert [step for step, *_ in a] == [step for step, *_ in b]
    for (_, *x), (_, *y) in zip(a, b, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(x, y, strict=True))


@pytest.mark.parametrize("form", ["folder", "recordio", "webdataset", "parquet", "arrow"])
def test_batches_are_those_of_the_set_in_memory(people, tmp_path, form):
    path = people
    if form != "folder":
        convert(people, path := tmp_path / form, form)
    whole = taken(FacesSource(read_folder(path, SIZE)))
    assert len(whole) == 9
    assert whole[0][1].shape == (5, 3, *SIZE)
    assert_same(taken(streamed(path)), whole)


def test_any_step_any_rank_and_any_number_of_workers(people):
    source = streamed(people, workers=3)
    whole = taken(source)
    assert source.timing is not None
    assert source.timing.report()["samples"] == 36
    assert_same(taken(source, first=4), whole[4:])
    parts = [taken(streamed(people), part=RankSlice(rank, 2)) for rank in (0, 1)]
    for (_, _, labels), *ranks in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([labels for _, _, labels in ranks]), labels)


def test_every_image_comes_once_an_epoch(people):
    faces = read_folder(people, SIZE)
    with ImageLoader(people, 5, size=SIZE, seed=3, last_step=6, workers=1) as loader:
        got = [(images.clone(), labels) for _, (images, labels) in loader]
    orders = [ShuffledOrder(12, seed=3)(epoch, np.arange(12))[0] for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(12))] * 2
    assert orders[0].tolist() != orders[1].tolist()
    rows = torch.from_numpy(np.concatenate(orders))
    assert torch.equal(torch.cat([images for images, _ in got]), faces.images[rows])
    assert torch.equal(torch.cat([labels for _, labels in got]), faces.labels[rows])


def test_training_on_files_is_training_in_memory_and_resumes(people, tmp_path):
    """A file that cannot be read in the middle of an epoch costs only its step."""
    whole = train(SMALL, read_folder(people, SIZE), tmp_path / "memory")
    source = streamed(people)
    file = Path(source.faces.name(int(ShuffledOrder(12, SMALL.seed).batch(2, 5)[0][1])))
    good = file.read_bytes()
    file.write_bytes(good[:60] + bytes(len(good) - 60))  # the size is what tells files apart
    with pytest.raises(DataError, match=f"(?s){file} cannot be used"):
        train(SMALL, source, tmp_path / "run")
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run"))["step"] == 2
    file.write_bytes(good)
    resumed = train(SMALL, source, tmp_path / "run", resume=True)
    assert resumed.history == whole.history
    for module in ("backbone", "head"):
        states = [getattr(run, module).state_dict() for run in (whole, resumed)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    lines = (tmp_path / "run" / TIMING).read_text().splitlines()
    assert [json.loads(line)["first_step"] for line in lines] == [0, 2]


def test_shards_that_can_be_read_in_order_only(people, tmp_path):
    convert(people, tmp_path / "tar", "webdataset")
    (shard,) = (tmp_path / "tar").glob("*.tar")
    subprocess.run(["gzip", shard], check=True)
    with pytest.raises(
        DataError, match="sequential reads, but training shuffles; convert it first"
    ):
        streamed(tmp_path / "tar")


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_command_line_streams_what_memory_does_not_hold(tmp_path):
    people = folder(tmp_path / "people", 6)
    tiny = ["--size", "16x18", "--embedding-size", "8", "--batch-size", "4", "--epochs", "1"]
    options = ["--data", people, "--holdout", "2", "--workers", "1", *tiny]
    memory = call("train", *options, "--output", tmp_path / "memory")
    assert "workers" not in memory
    stream = call("train", *options, "--memory", "0", "--output", tmp_path / "stream")
    assert " images/s; 1 workers, " in stream
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("memory", "stream")]
    assert logs[0] == logs[1]
    line = score(memory)
    assert line in stream
    again = call("eval", tmp_path / "stream")
    assert line in again
    assert "2 people never trained on" in again


def print_growth(folder: Path) -> None:
    """Print the number of images, and by how much all but the first raise the peak of memory."""
    source = FacesSource(open_images(folder), size=(64, 64), workers=1)
    before = 0
    for step, _ in source.batches(TrainConfig(epochs=1, batch_size=32, augment=0.0), 0):
        if step == 30:
            before = status("VmHWM")
    print(len(source), status("VmHWM") - before)


@pytest.mark.slow
def test_the_peak_of_memory_does_not_grow_with_the_set(tmp_path):
    """The last 2,000 images would be 25 MB of bytes, 98 MB of float32."""
    image = Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).convert("RGB")
    for person in range(2):
        folder = tmp_path / "many" / f"p{person}"
        folder.mkdir(parents=True)
        image.save(folder / "0.png")
        for i in range(1, 1500):
            (folder / f"{i}.png").hardlink_to(folder / "0.png")
    images, grown = numbers_of(tmp_path / "shown", print_growth, tmp_path / "many")
    assert images == 3000
    assert grown < 8_000_000


def test_an_index_is_a_few_bytes_an_image(tmp_path):
    """An index of 100,000 records takes little memory, while it is read too."""
    import tracemalloc

    count = 100_000
    (tmp_path / "train.idx").write_text("".join(f"{k}\t{k * 40}\n" for k in range(count)))
    words = np.zeros((count, 10), np.uint32)  # frame, header, 8 bytes
    words[:, 0], words[:, 1] = 0xCED7230A, 32
    words[:, 3] = (np.arange(count) % 1000).astype(np.float32).view(np.uint32)
    words.tofile(tmp_path / "train.rec")
    tracemalloc.start()
    try:
        images = open_images(tmp_path / "train.rec")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(images), len(images.identities)) == (count, 1000)
    assert held < 32 * count
    assert peak < 120 * count
