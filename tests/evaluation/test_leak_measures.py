"""Nearest rows of other labels, digests of pixels, and embeddings of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from synface.data import DataError, convert, open_images, read_folder
from synface.evaluation import (
    embed_pixels,
    identify,
    leak,
    nearest_of_another,
    pixel_digests,
    pixel_embeddings,
)
from torch.nn.functional import normalize

from tests.helpers.images import folder, truncate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("labels", ["sorted", "mixed", "one large"])
@pytest.mark.parametrize("block", [4, 8192])
def test_the_nearest_of_another_label_is_that_of_all_pairs(monkeypatch, dtype, labels, block):
    monkeypatch.setattr(leak, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator).to(dtype)
    x[7] = x[300]  # a copy under another label
    given = {
        "sorted": torch.arange(600) // 4,
        "mixed": torch.randperm(600, generator=generator) % 70,
        "one large": (torch.arange(600) > 590).int() * 3 - 1,
    }[labels]
    unit = normalize(x.double())
    cosine = 1 - (unit[:, None] - unit).square().sum(2) / 2
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = cosine.masked_fill(given[:, None] == given, -2).amax(1).to(kind)
    told = []
    found = nearest_of_another(x, given, progress=lambda *done: told.append(done))
    assert found.dtype == kind
    assert torch.allclose(found, wanted, rtol=0, atol=1e-15)  # float32 ones are equal
    assert told[-1] == (600, 600)


def test_labels_are_checked():
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="labels must have at least 2 values, got 1"):
        nearest_of_another(x, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels must be integer of shape \(6,\), got int64"):
        nearest_of_another(x, torch.arange(5))
    with pytest.raises(ValueError, match="embeddings must be floating point"):
        nearest_of_another(x[0], torch.arange(3))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]])
def test_rows_without_a_cosine_are_refused(value, labels):
    x = torch.randn(6, 3)
    x[4] = value
    wanted = "have non-zero" if value == 0 else "be finite"
    with pytest.raises(ValueError, match=f"embeddings must {wanted}.*got 1 of 6 rows"):
        nearest_of_another(x, torch.tensor(labels))
    people = torch.arange(3)
    with pytest.raises(ValueError, match=f"probe must {wanted}.*got 1 of 3 rows"):
        identify(x[3:], people, x[:3], people)
    with pytest.raises(ValueError, match=f"gallery must {wanted}.*got 1 of 3 rows"):
        identify(x[:3], people, x[3:], people)


def test_equal_pixels_have_equal_digests_in_any_format(tmp_path):
    images = open_images(folder(tmp_path / "gray", 3, 3, seed=0))
    digests = pixel_digests(images.store)
    assert len(set(digests)) == 9
    for suffix, mode in (("bmp", "L"), ("tif", "RGB"), ("webp", "RGB")):
        for index in range(9):
            file = tmp_path / suffix / f"p{index // 3}" / f"{index}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(images.name(index)).convert(mode).save(file, lossless=True)
        assert pixel_digests(open_images(tmp_path / suffix).store) == digests
    told = []
    record = convert(images, tmp_path / "record", "recordio")
    found = pixel_digests(record.store, progress=lambda *done: told.append(done))
    assert found == digests
    assert told == [(0, 9), (9, 9)]
    assert leak.copies([b"x", digests[4], digests[4]], [*digests, digests[4]]) == [(1, 4), (2, 4)]
    other = np.array(Image.open(images.name(2)))
    other[0, 0] ^= 1  # of one bit
    Image.fromarray(other).save(images.name(2))
    changed = pixel_digests(images.store)
    assert [i for i in range(9) if changed[i] != digests[i]] == [2]


def test_pixels_of_a_store_are_those_of_decoded_images(tmp_path):
    path = folder(tmp_path / "faces", 3, 5, seed=0)
    Image.new("L", (30, 20), 9).save(path / "p1" / "black.png")
    Image.new("L", (20, 30), 255).save(path / "p2" / "white.png")
    images = open_images(path)
    told = []
    rows = embed_pixels(
        images.store, (12, 10, 1), batch_size=4, progress=lambda *done: told.append(done)
    )
    wanted = pixel_embeddings(read_folder(path, (12, 10)).images)
    flat = [i for i in range(17) if "black" in images.name(i) or "white" in images.name(i)]
    assert (wanted[flat] == 0).all()
    kept = [i for i in range(17) if i not in flat]
    assert torch.equal(rows[kept], wanted[kept])
    cosine = rows.double() @ rows.double().T
    assert cosine[flat][:, flat].sub(1).abs().max() < 1e-6
    assert cosine[flat][:, kept].abs().max() < 1e-6
    assert told[0] == (0, 17)
    assert told[-1] == (17, 17)


def test_images_that_cannot_be_decoded_are_named(tmp_path):
    images = open_images(folder(tmp_path / "faces", 3, 5, seed=0))
    truncate(tmp_path / "faces" / "p1" / "2.png")
    for function in (pixel_digests, lambda store: embed_pixels(store, (8, 8, 1))):
        with pytest.raises(DataError, match=r"(?s)expected readable, complete.*p1/2\.png"):
            function(images.store)
    with pytest.raises(ValueError, match="of memory"):
        embed_pixels(images.store, (10**6, 10**6, 3))
