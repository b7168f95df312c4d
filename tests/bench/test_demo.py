"""The demonstration's parts: mixed faces, a packing against random points, figures, tables."""

import numpy as np
import pytest
import torch
from PIL import Image
from synface.bench import demo
from synface.bench.measure import Workload
from synface.data import embedded_faces
from synface.reporting import plots


@pytest.fixture(scope="module")
def real():
    return embedded_faces(1, 64, identities=2).images[1]


@pytest.mark.slow
def test_mixed_faces_end_in_the_real_and_the_generated_face(real):
    images = demo.mix_faces(real, seed=0).images
    count = len(demo.SHARES)
    assert images.shape == (count, count, 64, 64, 1)
    torch.testing.assert_close(images[:, -1], (real / 255).expand(count, -1, -1, -1))
    generated = images[:, 0]
    middle = (generated + real / 255) / 2
    torch.testing.assert_close(images[:, count // 2], middle, atol=1e-6, rtol=0)
    ends = (generated[0] - generated[-1]).abs().mean()
    steps = (generated[1:] - generated[:-1]).abs().mean((1, 2, 3))
    assert 0 < steps.max() < ends
    assert demo.mix_faces(real, seed=0).images.equal(images)
    assert not demo.mix_faces(real, seed=1).images.equal(images)


def test_a_generator_of_colors_with_a_neutral_style(real, monkeypatch):
    class Colors:
        style_size, neutral, description = 3, torch.tensor([1.0, 2.0, 3.0]), {"kind": "colors"}

        def generate(self, embedding, style, seed):
            assert style.eq(self.neutral).all()
            assert torch.allclose(embedding.norm(dim=1), torch.ones(len(embedding)))
            return torch.full((len(seed), 64, 64, 3), 255, dtype=torch.uint8)

    monkeypatch.setattr(demo, "open_generator", lambda *_, **__: Colors())
    images = demo.mix_faces(real, seed=0).images
    assert images.shape[-1] == 3
    assert images[:, 0].eq(1).all()
    torch.testing.assert_close(images[0, -1], (real / 255).expand(-1, -1, 3))


def test_packed_points_are_farther_apart_than_random_ones():
    points = demo.pack_points(40, 8, 50, seed=0)
    numbers = points.numbers()
    assert numbers["worst_cosine"] == pytest.approx(points.nearest.max(), abs=1e-6)
    assert numbers["bound"] < numbers["worst_cosine"] < numbers["random_worst_cosine"]
    assert len(points.nearest) == len(points.random_nearest) == 40
    again = demo.pack_points(40, 8, 50, seed=0).numbers()
    assert again | {"seconds": 0} == numbers | {"seconds": 0}


def test_what_is_not_measured_is_in_the_table():
    reason = "not measured: ArithmeticError: wrong"
    softmax = demo.Softmax(
        Workload(n=100), {"fused": 0.5, "eager": 1.0, "torch.compile": reason},
        {"fused": 2**20, "eager": 2**21, "torch.compile": reason}, "impl=cpu",
    )  # fmt: skip
    head, fused, eager, compiled = demo.softmax_table(softmax)
    assert head[3] == "rows/s"
    assert fused == ["fused (impl=cpu)", "500 ms", "1.00 ×", "200", "1 MiB"]
    assert eager == ["eager", "1000 ms", "2.00 ×", "100", "2 MiB"]
    assert compiled == ["torch.compile", reason, "not measured", "not measured", reason]


@pytest.mark.parametrize("log", [False, True])
def test_densities_are_drawn_where_some_bins_or_all_are_empty(tmp_path, log):
    edges = np.linspace(-1, 1, 11)
    full = np.where(np.arange(10) == 3, 5.0, 0.0)
    curves = {"one": (full, edges), "none": (np.zeros(10), edges)}
    plots.densities(curves, tmp_path / "d.png", title="T", x="score", lines={"at": 0.5}, log=log)
    with Image.open(tmp_path / "d.png") as picture:
        assert min(picture.size) > 200


def test_groups_of_pairs_may_differ_in_number(tmp_path):
    gray, color = torch.rand(9, 7, 1).numpy(), torch.rand(9, 7, 3).numpy()
    groups = {"genuine": [(gray, gray, "0.1")], "impostor": [(color, color, "0.9")] * 3}
    plots.image_pairs(groups, "Hardest pairs", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > picture.size[1] > 200
