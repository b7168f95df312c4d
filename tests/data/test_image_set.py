"""Sets of images as torch datasets, whether files hold them or memory."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from synface.data import DataError, Faces, convert, embedded_faces, open_images, read_folder
from synface.data.formats.image_set import LabeledImages, common_shape
from synface.data.loading.worker import SharedStore
from torch.utils.data import DataLoader, Dataset, Subset, random_split

from tests.helpers.forked import start_server
from tests.helpers.images import folder, truncate


@pytest.fixture
def faces() -> Faces:
    """Return twelve images of three people, of three channels."""
    gray = embedded_faces(4, 16, identities=3)
    return Faces(gray.images.expand(-1, -1, -1, 3), gray.labels, gray.identities, "here")


@pytest.mark.parametrize("form", ["folder", "recordio", "webdataset", "parquet", "arrow", None])
def test_a_set_is_a_torch_dataset(faces, tmp_path, form):
    if form in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    images = faces if form is None else convert(faces, tmp_path / "set", form)
    assert isinstance(images, Dataset)
    assert len(images) == 12
    for index in (0, 5, -1):
        image, label = images[index]
        assert torch.equal(image, faces.images[index])
        assert type(label) is int
        assert label == faces.labels[index]
    assert torch.equal(torch.stack([image for image, _ in images]), faces.images)
    for index in (12, -13):
        with pytest.raises(IndexError):
            images[index]
    first, second = random_split(images, [8, 4])
    assert len(first) + len(second) == 12
    assert torch.equal(Subset(images, [7])[0][0], faces.images[7])


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.slow
def test_torchs_loader_reads_it_in_worker_processes(faces, tmp_path, in_memory):
    images = faces if in_memory else convert(faces, tmp_path / "set", "recordio")
    server = start_server()  # which gets what a new interpreter gets: pickled
    loader = DataLoader(images, batch_size=5, num_workers=2, multiprocessing_context=server)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), faces.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), faces.labels)


def test_an_item_has_the_size_and_the_channels_of_its_file(tmp_path):
    images = open_images(folder(tmp_path / "gray", 2, 2, seed=1))
    assert [tuple(image.shape) for image, _ in images] == [
        (20, 18, 1),
        (21, 18, 1),
        (20, 19, 1),
        (21, 19, 1),
    ]
    assert images[1][0].is_contiguous()
    images[1][0].zero_()  # a copy
    colored = open_images(folder(tmp_path / "colored", 2, 1, seed=1, mode="RGB"))
    assert colored[0][0].shape == (20, 18, 3)


def test_an_item_that_cannot_be_decoded_is_named(tmp_path):
    root = folder(tmp_path / "faces", 2, 2, seed=1)
    truncate(root / "p1" / "0.png")
    images = open_images(root)
    with pytest.raises(DataError, match=r"p1/0\.png: .*truncated"):
        images[2]


def test_faces_in_memory_are_a_set_like_any_other(faces, tmp_path):
    assert isinstance(faces, LabeledImages)
    assert faces.name(3) == "image 3 of here"
    assert np.shares_memory(faces.store.pixels, faces.images.numpy())
    copy = pickle.loads(pickle.dumps(faces.store))
    assert np.array_equal(copy.pixels, faces.images)
    assert copy.fingerprint() == faces.store.fingerprint()
    shared = SharedStore.of(faces.store)
    assert np.array_equal(shared.store().pixels, faces.images)
    assert len(shared.pickled) < 1000  # the pixels are in shared memory
    smaller = read_folder(faces, (8, 9), grayscale=True)
    assert smaller.images.shape == (12, 8, 9, 1)
    train, held = faces.split(1)
    assert isinstance(held, Faces)
    assert torch.equal(held.images, faces.images[8:])
    assert held.labels.tolist() == [0] * 4
    assert common_shape([train, held], None, None) == (16, 16, 3)


def test_readers_and_their_stores_do_without_torch(tmp_path):
    root = folder(tmp_path / "faces", 2, 2, seed=1)
    code = (
        "import sys, pickle; from pathlib import Path\n"
        "from synface.data.formats import imagefolder, recordio, tables, webdataset\n"
        "from synface.data.formats.images import FORMATS, detect\n"
        "from synface.data.loading import worker\n"
        "store = imagefolder.list_images(Path(sys.argv[1])).store\n"
        "assert pickle.loads(pickle.dumps(store)).decode(0).shape == (20, 18, 1)\n"
        "assert detect(sys.argv[1]) == FORMATS['folder'] and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
