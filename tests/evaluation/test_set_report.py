"""Results of a network on verification sets: embeddings, measures, and `synface eval`."""

from __future__ import annotations

import json
import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from synface.data import DataError, embedded_faces
from synface.evaluation.embedding import embed, embed_store
from synface.evaluation.metrics import identify, verify_pairs
from synface.evaluation.report import evaluate_set, pair_cosines
from synface.evaluation.sets import read_bin

from tests.helpers.command_line import call, refused
from tests.helpers.verification_sets import SAME, Flat, images, png


def scores(pairs: int = 400, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    same = torch.rand(pairs, generator=g) < 0.5
    cosine = torch.randn(pairs, generator=g) * 0.2 + same * 0.3
    return cosine.double().round(decimals=2), same, torch.arange(pairs) * 10 // pairs  # with ties


def test_pairs_against_scikit_learn_and_a_search_of_thresholds():
    cosine, same, fold = scores()
    got = verify_pairs(cosine, same, fold)
    assert got.auc == pytest.approx(roc_auc_score(same, cosine), abs=1e-12)
    fpr, tpr, _ = roc_curve(same, cosine, drop_intermediate=False)
    assert {*zip(got.fpr, got.tpr, strict=True)} <= {*zip(fpr, tpr, strict=True)}
    for far in (0.1, 0.01):
        assert got.tar[far] == tpr[fpr <= far].max()
    assert got.tar[1e-6] is None
    accuracies = []
    for i in range(10):
        rest, here = fold != i, fold == i
        best = max(
            [*cosine[rest].tolist(), 9.0],
            key=lambda t: (((cosine >= t) == same)[rest].sum().item(), t),
        )
        accuracies.append(((cosine >= best) == same)[here].double().mean().item())
    # A threshold midway in its gap may take another side of a test pair than its upper end.
    assert got.accuracy == pytest.approx(np.mean(accuracies), abs=0.02)
    assert verify_pairs(cosine, same).accuracy is None
    perfect = verify_pairs(same.double(), same, fold)
    assert (perfect.accuracy, perfect.auc) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosine": torch.ones(3)}, r"same must be bool of shape \(3,\)"),
        ({"cosine": torch.full((400,), torch.nan)}, "cosine must be finite"),
        ({"same": torch.ones(400, dtype=torch.bool)}, "both kinds, got 400 genuine ones of 400"),
        ({"fold": torch.zeros(400, dtype=int)}, "two different values or more, got 1"),
        ({"fold": torch.zeros(3, dtype=int)}, r"fold must be integer of shape \(400,\)"),
        ({"fars": (0.0,)}, r"fars must lie in \(0, 1\]"),
    ],
)
def test_pairs_that_cannot_be_verified(change, message):
    cosine, same, fold = scores()
    with pytest.raises(ValueError, match=message):
        verify_pairs(**({"cosine": cosine, "same": same, "fold": fold} | change))


def test_rank_1():
    gallery, probe = torch.eye(3), torch.tensor([[1.0, 0.2, 0], [0, 0.4, 0.5], [0, 1, 0]])
    found = identify(probe, torch.tensor([4, 5, 5]), gallery, torch.tensor([4, 5, 6]))
    assert (found.rank1, found.probes, found.gallery) == (pytest.approx(2 / 3), 3, 3)
    with pytest.raises(ValueError, match="only hold people of the gallery"):
        identify(probe, torch.tensor([4, 5, 9]), gallery, torch.tensor([4, 5, 6]))


def test_embedding_encoded_images_is_embedding_decoded_ones(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images(), SAME), 4))
    store = read_bin(tmp_path / "x.bin").store
    decoded = [np.asarray(Image.open(BytesIO(image)))[..., None] for image in images()]
    pixels = torch.from_numpy(np.stack(decoded))
    for flip in (False, True):
        wanted = embed(Flat(36), pixels, flip=flip)
        for batch in (1, 3, 8):
            got = embed_store(Flat(36), store, (6, 6, 1), batch_size=batch, flip=flip)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    first, second = torch.tensor([0, 2]), torch.tensor([1, 3])
    wanted = (wanted[first].double() * wanted[second].double()).sum(1)
    torch.testing.assert_close(
        pair_cosines(got, first, second, 1).double(), wanted, atol=1e-6, rtol=0
    )


def test_an_image_of_another_size_or_none_is_named(tmp_path):
    content = [*images(7), images(1, size=7)[0]]
    (tmp_path / "x.bin").write_bytes(pickle.dumps((content, SAME), 4))
    data = read_bin(tmp_path / "x.bin")
    with pytest.raises(DataError, match=r"image 7, offset \d+: decodes to 7x7 .*expected 6x6"):
        evaluate_set(Flat(36), data, (6, 6, 1))
    assert evaluate_set(Flat(36), data, (6, 6, 1), resize=True).images == 8
    data.store.images[3] = b"no image"
    with pytest.raises(DataError, match=r"1 of 8 images.*\n.*image 3, .*not a readable image"):
        evaluate_set(Flat(36), data, (6, 6, 1), resize=True)


class Adaptive(Flat):
    """A network that returns embeddings and their norms, as AdaFace's do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().forward(x)
        norm = found.norm(dim=1, keepdim=True)
        return found / norm, norm


def test_of_embeddings_and_norms_the_first_are_taken(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images(), SAME), 4))
    data = read_bin(tmp_path / "x.bin")
    wanted, got = (
        evaluate_set(network, data, (6, 6, 1), flip=False).verification
        for network in (Flat(36), Adaptive(36))
    )
    assert got.auc == wanted.auc
    assert np.array_equal(got.tpr, wanted.tpr)


class Broken(Flat):
    """A network that applies ``wrong`` to its embeddings."""

    def __init__(self, wrong) -> None:
        super().__init__(36)
        self.wrong = wrong

    def forward(self, x: torch.Tensor):
        return self.wrong(super().forward(x))


def spoil(value: float):
    """Return a function that puts a value into the last and the third embedding of a batch."""

    def wrong(rows: torch.Tensor) -> torch.Tensor:
        rows[-1, 3], rows[2, 0] = value, value
        return rows

    return wrong


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("flip", [False, True])
def test_an_embedding_that_is_not_finite_names_its_image(tmp_path, value, flip):
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images(), SAME), 4))
    data = read_bin(tmp_path / "x.bin")
    network = Broken(spoil(value))
    with pytest.raises(ValueError, match=r"2 of 4 images are not finite.*: .*image 2, .*image 3,"):
        evaluate_set(network, data, (6, 6, 1), flip=flip, batch_size=4)
    with pytest.raises(ValueError, match=r"embeddings of 2 of 5 images .*: image 2, image 4;"):
        embed(network, torch.zeros(5, 6, 6, 1, dtype=torch.uint8), flip=flip)


def test_the_name_is_that_of_the_image_in_a_later_batch(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images(), SAME), 4))
    data = read_bin(tmp_path / "x.bin")
    data.store.images[5] = png(np.zeros((6, 6), np.uint8))

    class NoBlack(Flat):
        """A network that divides by zero for a black image."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / (x.flatten(1).amax(1, keepdim=True) > -1)

    with pytest.raises(ValueError, match=r"1 of 3 images are not finite.*: .*x.bin, image 5, off"):
        evaluate_set(NoBlack(36), data, (6, 6, 1), batch_size=3)


def test_long_embeddings_do_not_overflow():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 6, 6, 1), np.uint8))
    far = embed(Broken(lambda rows: rows * 1e30), pixels, flip=False)
    torch.testing.assert_close(far, embed(Flat(36), pixels, flip=False), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda rows: {"embedding": rows}, TypeError, "or a tuple that begins with them, got dict"),
        (lambda rows: None, TypeError, "got NoneType"),
        (lambda rows: (), TypeError, "got tuple: empty"),
        (lambda rows: ("x", rows), TypeError, "got tuple: str, float32"),
        (lambda rows: rows.long(), TypeError, r"got Tensor: int64 \(4, 16\)"),
        (lambda rows: rows[1:], ValueError, r"shape \(4, D\) for 4 images, got \(3, 16\)"),
        (lambda rows: (rows[0], rows), ValueError, r"got \(16,\)"),
        (lambda rows: rows[:, :0], ValueError, r"got \(4, 0\)"),
    ],
)
def test_a_network_that_returns_something_else_is_a_clear_error(wrong, error, message):
    with pytest.raises(error, match=message):
        embed(Broken(wrong), torch.zeros(4, 6, 6, 1, dtype=torch.uint8))


# -- the command line


@pytest.mark.slow
def test_eval_reports_on_sets(tmp_path):
    faces = embedded_faces(4, 24, identities=8)
    root = tmp_path / "faces"
    for i, (image, label) in enumerate(zip(faces.images, faces.labels, strict=True)):
        (root / faces.identities[label]).mkdir(parents=True, exist_ok=True)
        (root / faces.identities[label] / f"{i % 4}.png").write_bytes(png(image[:, :, 0].numpy()))
    names = faces.identities
    lines = ["10\t2"]
    for i in range(10):
        a, b = names[i % 8], names[(i + 3) % 8]
        lines += [f"{a}\t0\t1", f"{a}\t2\t3", f"{a}\t0\t{b}\t1", f"{a}\t2\t{b}\t3"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    content, same = [], []
    for line in lines[1:]:
        words = line.split("\t")
        ends = [(words[0], words[1]), (words[0], words[2]) if len(words) == 3 else words[2:]]
        content += [(root / name / f"{number}.png").read_bytes() for name, number in ends]
        same.append(len(words) == 3)
    (tmp_path / "same.bin").write_bytes(pickle.dumps((content, same), 2))
    run = tmp_path / "run"
    options = ["--epochs", 1, "--size", "24x24", "--embedding-size", 8, "--holdout", 0]
    call("train", "--data", root, "--output", run, *options)
    pairs, same_bin, report = (tmp_path / name for name in ("pairs.txt", "same.bin", "report"))
    shown = call("eval", "--checkpoint", run, "--set", pairs, "--images", root)
    assert "not measured" not in shown
    call("eval", run, "--set", same_bin, "--output", report)
    found = json.loads((report / "results.json").read_text())
    assert [each["name"] for each in found["sets"]] == ["same"]
    for name in ("roc.png", "det.png"):
        with Image.open(report / name) as picture:
            assert min(picture.size) > 200
    page = (report / "index.html").read_text()
    assert f"{found['sets'][0]['verification']['auc']:.4f}" in page
    assert "det.png" in page
    for arguments, message in (
        ([], "eval needs one run"),
        ([run, "--checkpoint", run], "eval needs one run"),
        ([run, "--set", same_bin, "--holdout", 2], "--set cannot be combined"),
        ([run, "--set", same_bin, "--images", root], "holds its images"),
    ):
        assert message in refused("eval", *arguments)
