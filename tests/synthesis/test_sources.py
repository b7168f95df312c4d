"""Generated training data: as `synthesize` writes it, mixed by identity and by domain."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from synface.data import Augment, normalize, read_folder
from synface.data.loading.sampler import RankSlice
from synface.data.mixing import Constant, IdentityMixup
from synface.recipes.generated import identities
from synface.synthesis import EigenfaceGenerator, GeneratedSource, synthesize
from synface.training import TrainConfig

from tests.helpers.generators import people

CONFIG = TrainConfig(epochs=2, batch_size=5, augment=0.0, seed=3)


def test_generated_images_are_those_of_a_folder(tmp_path):
    """An epoch without mixing has the images that `synthesize` writes, in another order."""
    points, generator = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    synthesize(points, generator, tmp_path / "faces", 3, seed=7)
    written = read_folder(tmp_path / "faces")
    source = GeneratedSource(points, generator, 3, seed=7)
    assert (source.num_classes, len(source)) == (4, 12)
    epochs = [batch for _, batch in source.batches(CONFIG, 0)]
    assert [len(batch.images) for batch in epochs] == [5, 5, 2] * 2
    for epoch in (epochs[:3], epochs[3:]):
        labels = torch.cat([batch.target for batch in epoch])
        images = torch.cat([batch.images for batch in epoch])
        for label in range(4):
            wanted = normalize(written.images[written.labels == label]).flatten(1)
            came = images[labels == label].flatten(1)
            assert sorted(wanted.tolist()) == sorted(came.tolist())
    assert not torch.equal(epochs[0].target, epochs[3].target)


def test_identity_mixup_draws_the_identity_between():
    points, generator = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    mixup = IdentityMixup(Constant(0.25))
    source = GeneratedSource(points, generator, 2, seed=7, identity_mixup=mixup)
    _, batch = next(source.batches(CONFIG, 0))
    assert batch.target.shape == (5, 2)
    torch.testing.assert_close(batch.target_weight, torch.tensor([[0.25, 0.75]] * 5))
    plain = GeneratedSource(points, generator, 2, seed=7)
    assert torch.equal(next(plain.batches(CONFIG, 0))[1].target, batch.target[:, 0])
    # The coefficients, seen by a face generator that shows them.
    seen = []

    class Shown(EigenfaceGenerator):
        def generate(self, embedding, style, seed):
            seen.append(embedding)
            return super().generate(embedding, style, seed)

    next(GeneratedSource(points, Shown(8, 16), 2, identity_mixup=mixup).batches(CONFIG, 0))
    first, second = points[batch.target.T]
    torch.testing.assert_close(seen[0], F.normalize(0.25 * first + 0.75 * second))


@pytest.mark.parametrize("psi", [0.0, 1.0, 0.25])
def test_domain_mixup_mixes_the_augmented_sides(psi):
    points, generator, real = identities(4, 8, seed=1), EigenfaceGenerator(8, 16), people(3, 2)
    config = replace(CONFIG, augment=1.0)
    source = GeneratedSource(points, generator, 2, real=real, ratio=Constant(psi))
    assert source.num_classes == 7
    _, mixed = next(source.batches(config, 0))
    _, plain = next(GeneratedSource(points, generator, 2).batches(config, 0))
    assert torch.equal(mixed.target[:, 0], plain.target)
    assert (mixed.target[:, 1] >= 4).all()
    assert mixed.target_weight.tolist() == [[psi, 1 - psi]] * 5
    if psi == 1.0:
        torch.testing.assert_close(mixed.images, plain.images)
    only_real = GeneratedSource(points, generator, 2, real=real, ratio=Constant(0.0))
    other = next(only_real.batches(config, 0))[1].images
    torch.testing.assert_close(mixed.images, psi * plain.images + (1 - psi) * other)


def test_three_labels_parts_and_resumption():
    points, generator, real = identities(4, 8, seed=1), EigenfaceGenerator(8, 16), people(3, 2)
    source = GeneratedSource(points, generator, 3, real=real, identity_mixup=IdentityMixup())
    whole = dict(source.batches(CONFIG, 0))
    assert list(whole) == list(range(6))
    batch = whole[2]
    assert batch.target.shape == batch.target_weight.shape == (2, 3)
    assert (batch.target_weight.sum(1) == 1).all()
    for step, again in source.batches(CONFIG, 4):
        assert all(map(torch.equal, again, whole[step]))
    parts = [dict(source.batches(CONFIG, 0, RankSlice(rank, 2))) for rank in (0, 1)]
    assert [len(part[0].images) for part in parts] == [2, 3]
    seen = torch.cat([part[0].target[:, 0] for part in parts])
    assert torch.equal(seen, whole[0].target[:, 0])


def test_bad_sources_are_named():
    points, generator = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    with pytest.raises(ValueError, match="images_per_identity must be at least 1, got 0"):
        GeneratedSource(points, generator, 0)
    with pytest.raises(ValueError, match=r"embeddings must be .* \(N, 8\)"):
        GeneratedSource(points[:, :7], generator, 2)
    with pytest.raises(ValueError, match=r"real must hold images of shape \(16, 16, 1\)"):
        GeneratedSource(points, generator, 2, real=people(3, 2, size=12))
    assert Augment(0.0)(people(2, 1).images, torch.Generator()).shape == (2, 1, 16, 16)


def test_the_earlier_name_of_the_generator(tmp_path):
    points, generator = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    with pytest.warns(DeprecationWarning, match="painter= of GeneratedSource.*: use generator="):
        source = GeneratedSource(points, painter=generator, images_per_identity=2)
    assert source.generator is generator
    with pytest.raises(TypeError, match="both painter= and generator="), pytest.warns():
        GeneratedSource(points, painter=generator, generator=generator, images_per_identity=2)


@pytest.mark.parametrize("mixup", [None, IdentityMixup()])
def test_kept_epochs_are_generated_once_and_repeated(mixup):
    """Epoch e shows the images and labels of epoch e mod 2; a resumed run has the same."""
    calls = []

    class Counted(EigenfaceGenerator):
        def generate(self, embedding, style, seed):
            calls.append(len(seed))
            return super().generate(embedding, style, seed)

    points = identities(5, 8, seed=1)
    config = replace(CONFIG, epochs=4)

    def source():
        return GeneratedSource(points, Counted(8, 16), 3, identity_mixup=mixup, keep_epochs=2)

    def shown(batches):
        rows = set()
        for batch in batches:
            weight = batch.target_weight
            weight = torch.ones(len(batch.images), 1) if weight is None else weight
            target = batch.target.view(len(weight), -1)
            joined = torch.cat([target, weight, batch.images.flatten(1)], 1)
            rows |= {tuple(row) for row in joined.tolist()}
        return rows

    batches = [batch for _, batch in source().batches(config, 0)]
    assert sum(calls) == 2 * 15
    epochs = [shown(batches[i : i + 3]) for i in range(0, 12, 3)]
    assert all(len(epoch) == 15 for epoch in epochs)
    assert epochs[0] == epochs[2]
    assert epochs[1] == epochs[3]
    assert (epochs[0] == epochs[1]) == (mixup is None)
    later = [batch for _, batch in source().batches(config, 7)]
    for one, other in zip(batches[7:], later, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.target, other.target)
    assert source().description()["keep_epochs"] == 2
    assert GeneratedSource(points, Counted(8, 16), 3).description()["keep_epochs"] is None
    with pytest.raises(ValueError, match="keep_epochs must be at least 1, got 0"):
        GeneratedSource(points, Counted(8, 16), 3, keep_epochs=0)


def test_a_kept_epoch_without_mixup_has_the_images_of_any_other():
    points, generator = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    fresh = GeneratedSource(points, generator, 3, seed=7).batches(CONFIG, 0)
    kept = GeneratedSource(points, generator, 3, seed=7, keep_epochs=1).batches(CONFIG, 0)
    for (_, one), (_, other) in zip(fresh, kept, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.target, other.target)
