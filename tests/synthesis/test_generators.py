"""Face generators: eigenfaces, and models in TorchScript and ONNX files."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synface.data import Faces, embedded_faces, read_folder
from synface.data.embedded import FACES, lfw_crops
from synface.evaluation.embedding import pixel_embeddings
from synface.evaluation.metrics import verify
from synface.synthesis import synthesize
from synface.synthesis.generators import (
    EigenfaceGenerator,
    HeadGenerator,
    OnnxGenerator,
    TorchScriptGenerator,
    open_generator,
)

from tests.helpers.generators import Noisy, arguments, scripted, unit

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


# -- eigenfaces


@pytest.mark.parametrize(("dim", "size"), [(2, 8), (16, 33), (512, 48)])
def test_an_image_depends_on_its_own_arguments_alone(dim, size):
    generator = EigenfaceGenerator(dim, size)
    embedding, style, seed = arguments(13, dim, generator.style_size)
    images = generator.generate(embedding, style, seed)
    assert images.dtype == torch.uint8
    assert images.shape == (13, *generator.image_shape) == (13, size, size, 1)
    state = torch.get_rng_state()
    for order in ([[3], [0]], [[1, 2, 3, 4, 5]], [list(range(12, -1, -1))]):
        for rows in order:
            again = generator.generate(embedding[rows], style[rows], seed[rows])
            assert torch.equal(again, images[rows])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generator.generate(embedding, style, seed + 1), images)
    assert not torch.equal(generator.generate(embedding, style.flip(0), seed), images)


@pytest.mark.parametrize("dim", [2, 60, 99, 300])
def test_the_faces_vary_as_the_crops_do(dim):
    """The map's singular values are the crops' deviations along their principal axes."""
    crops = torch.from_numpy(lfw_crops()).flatten(1)
    covariance = torch.from_numpy(np.cov(crops.numpy(), rowvar=False))
    variance = torch.linalg.eigvalsh(covariance).flip(0)[: min(dim, FACES - 1)]
    found = torch.linalg.svdvals(EigenfaceGenerator(dim)._axes)[: len(variance)] ** 2 / dim
    torch.testing.assert_close(found, variance, rtol=1e-4, atol=1e-7)


def test_the_crops_themselves_are_faces_of_the_generator():
    generator = EigenfaceGenerator(FACES - 1)
    offset = (torch.from_numpy(lfw_crops()) - generator._mean).flatten(1)
    embedding = torch.linalg.lstsq(generator._axes.T, offset.T).solution.T
    torch.testing.assert_close(embedding @ generator._axes, offset, atol=1e-4, rtol=0)
    # Their lengths are those of typical faces: the coefficients have unit variance.
    assert embedding.norm(dim=1).square().mean() == pytest.approx(1.0, abs=0.02)


def test_embeddings_further_apart_show_faces_further_apart():
    generator = EigenfaceGenerator(64)
    a, b = unit(200, 64), unit(200, 64, seed=9)
    distance = []
    for share in (0.1, 0.3, 1.0):
        other = generator.faces(F.normalize(torch.lerp(a, b, share)))
        distance.append(float((other - generator.faces(a)).abs().mean()))
    assert distance == sorted(distance)
    assert distance[0] < 0.02
    assert distance[-1] > 0.1  # of the range from black to white
    cosine = (a @ a.T)[torch.ones(200, 200).triu(1) > 0]
    pixels = F.normalize((generator.faces(a) - generator._mean).flatten(1))
    seen = (pixels @ pixels.T)[torch.ones(200, 200).triu(1) > 0]
    # By the crops' spectrum: (sum of variances) / sqrt(D * sum of squared variances) = 0.43.
    assert np.corrcoef(cosine, seen)[0, 1] == pytest.approx(0.43, abs=0.06)


@pytest.mark.parametrize("dim", [32, 512])
def test_images_show_who_they_are_of(dim, tmp_path):
    """Verification is as accurate as on the real crops with the same variation."""

    def auc(faces: Faces) -> float:
        return verify(pixel_embeddings(faces.images), faces.labels).auc

    synthesize(unit(100, dim), EigenfaceGenerator(dim), tmp_path / "x", 6)
    assert auc(read_folder(tmp_path / "x")) > auc(embedded_faces(6)) - 0.05 > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, s, n: (e.double(), s, n), r"embedding must be float32 of shape \(3, 16\)"),
        (lambda e, s, n: (e[:, :5], s, n), r"embedding must be .* got float32 \(3, 5\)"),
        (lambda e, s, n: (e, s[:2], n), r"style must be float32 of shape \(3, 10\).*\(2, 10\)"),
        (lambda e, s, n: (e, s, n.int()), r"seed must be int64 of shape \(3,\).*got int32"),
        (lambda e, s, n: (e[:0], s[:0], n[:0]), "at least one row"),
    ],
)
def test_arguments_that_are_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        EigenfaceGenerator(16).generate(*change(*arguments(3, 16, 10)))


def test_sizes_that_are_wrong():
    with pytest.raises(ValueError, match="embedding_size must be at least 2, got 1"):
        EigenfaceGenerator(1)
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 7"):
        EigenfaceGenerator(8, 7)
    with pytest.raises(ValueError, match="style_size of the eigenfaces is 10, got 3"):
        open_generator("eigenfaces", 8, style_size=3)
    with pytest.raises(ValueError, match="style_size of the heads is 21, got 3"):
        open_generator(None, 8, style_size=3)
    with pytest.raises(ValueError, match="channels of the eigenfaces is 1, got 3"):
        open_generator("eigenfaces", 8, channels=3)
    with pytest.raises(ValueError, match="embedding_size of the heads must be given"):
        open_generator("heads")
    with pytest.raises(ValueError, match="columns are for generators in files"):
        open_generator("heads", 8, columns="identity=0:8")
    with pytest.raises(ValueError, match="channels is for the eigenfaces and the heads"):
        open_generator("x.pt", 8, channels=3)
    with pytest.raises(ValueError, match="size is for the eigenfaces"):
        open_generator("x.pt", 8, size=48)


def test_embedded_generators_by_name():
    assert isinstance(open_generator("eigenfaces", 8, size=16), EigenfaceGenerator)
    heads = open_generator(None, 8, size=16, channels=3)
    assert isinstance(heads, HeadGenerator)
    assert heads.image_shape == (16, 16, 3)
    assert open_generator("heads", 8, size=16).description["kind"] == "heads"


# -- TorchScript


class Tiny(torch.nn.Module):
    """(B, D) and (B, S) to (B, 3, 6, 5) in [-1, 1]."""

    style_size: int

    def __init__(self, dim: int, style: int):
        super().__init__()
        self.style_size = style
        self.linear = torch.nn.Linear(dim + style, 90)
        torch.nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, embedding: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(torch.cat([embedding, style], 1))).view(-1, 3, 6, 5)


class Wrong(torch.nn.Module):
    kind: str

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, embedding: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        images = torch.zeros(len(embedding), 3, 4, 4)
        if self.kind == "flat":
            return images[0]
        if self.kind == "batch":
            return images[:1]
        if self.kind == "channels":
            return images[:, :2]
        if self.kind == "dtype":
            return images.to(torch.int32)
        if self.kind == "nan":
            return images * float("nan")
        if self.kind == "range":
            return images + 255.0
        if self.kind == "later" and len(embedding) != 2:
            return images[:, :, :2]
        assert self.kind != "raises", "no such embedding"
        return images


def test_a_torchscript_file_gives_what_its_module_gives(tmp_path):
    module = Tiny(8, 4)
    generator = open_generator(scripted(module, tmp_path / "g.pt"), 8)
    assert isinstance(generator, TorchScriptGenerator)
    assert (generator.embedding_size, generator.style_size) == (8, 4)
    assert generator.image_shape == (6, 5, 3)
    embedding, style, seed = arguments(7, 8, 4)
    got = generator.generate(embedding, style, seed)
    want = (module(embedding, style).permute(0, 2, 3, 1) + 1) * 127.5
    assert got.dtype == torch.uint8
    torch.testing.assert_close(got.float(), want.detach(), atol=0.501, rtol=0)
    assert generator.description["kind"] == "torchscript"
    synthesize(embedding, generator, tmp_path / "faces", 3)
    assert read_folder(tmp_path / "faces").images.shape == (21, 6, 5, 3)


def test_a_torchscript_file_that_draws_is_seeded(tmp_path):
    generator = TorchScriptGenerator(scripted(Noisy(), tmp_path / "g.pt"), 8, 2)
    embedding, style, seed = arguments(3, 8, 2)
    state = torch.get_rng_state()
    images = generator.generate(embedding, style, seed)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(generator.generate(embedding, style, seed), images)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert not torch.equal(generator.generate(embedding, style, seed + 1), images)


def test_a_torchscript_file_on_a_cpu_leaves_the_gpus_alone(tmp_path, monkeypatch):
    generator = TorchScriptGenerator(scripted(Noisy(), tmp_path / "g.pt"), 8, 2)
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    generator.generate(*arguments(3, 8, 2))
    assert seeds == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flat", r"must return uint8 \(B, H, W, C\) or .* got float32 \(3, 4, 4\) for B = 2"),
        ("batch", r"got float32 \(1, 3, 4, 4\) for B = 2"),
        ("channels", r"C = 1 or 3; got float32 \(2, 2, 4, 4\)"),
        ("dtype", r"got int32 \(2, 3, 4, 4\)"),
        ("nan", "got values up to ±nan"),
        ("range", "got values up to ±255"),
        ("raises", r"failed on embedding \(2, 8\) and style \(2, 4\): .*no such embedding"),
    ],
)
def test_a_torchscript_file_that_is_no_generator(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        TorchScriptGenerator(scripted(Wrong(kind), tmp_path / "g.pt"), 8, 4)


@pytest.mark.parametrize("error", [IndexError, TypeError, torch.jit.Error])
def test_a_torchscript_file_that_raises_anything(tmp_path, monkeypatch, error):
    generator = TorchScriptGenerator(scripted(Tiny(8, 4), tmp_path / "g.pt"), 8)

    def fail(*_):
        raise error("no such row")

    monkeypatch.setattr(generator, "_model", fail)
    with pytest.raises(ValueError, match=r"g\.pt failed on embedding \(3, 8\) .*no such row"):
        generator.generate(*arguments(3, 8, 4))


def test_a_torchscript_file_that_changes_its_mind(tmp_path):
    generator = TorchScriptGenerator(scripted(Wrong("later"), tmp_path / "g.pt"), 8, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3\), earlier \(4, 4, 3\)"):
        generator.generate(*arguments(3, 8, 4))


class OneArgument(torch.nn.Module):
    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding


def test_torchscript_files_that_cannot_be_used(tmp_path):
    path = scripted(Tiny(8, 4), tmp_path / "g.pt")
    with pytest.raises(ValueError, match="does not state its embedding_size: give it"):
        TorchScriptGenerator(path)
    with pytest.raises(ValueError, match=r"style_size of .* is 4, got 5"):
        TorchScriptGenerator(path, 8, 5)
    with pytest.raises(ValueError, match=r"failed on embedding \(2, 9\)"):
        TorchScriptGenerator(path, 9)
    with pytest.raises(ValueError, match="style_size must be at least 1, got 0"):
        TorchScriptGenerator(scripted(Wrong("fine"), tmp_path / "w.pt"), 8, 0)
    with pytest.raises(ValueError, match="it takes 1 argument"):
        TorchScriptGenerator(scripted(OneArgument(), tmp_path / "one.pt"), 8, 4)
    (tmp_path / "text.pt").write_text("no model")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-300])
    for name in ("text.pt", "weights.pt", "cut.pt", "missing.pt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be loaded as TorchScript"):
            TorchScriptGenerator(tmp_path / name, 8, 4)
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one that .* got '{device}'"):
            TorchScriptGenerator(path, 8, device=device)
        with pytest.raises(ValueError, match=f"device must be one that .* got '{device}'"):
            open_generator(None, 8, device=device)
        with pytest.raises(ValueError, match=f"device must be one that .* got '{device}'"):
            open_generator("eigenfaces", 8, device=device)


# -- ONNX


def onnx_file(path: Path, dim=8, style=4, batch="B", seeded=False, outputs=12) -> Path:
    """Write a model of tanh([embedding, style] @ weight), as (B, 3, 2, 2)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((8 + 4, outputs)).astype(np.float32)
    shape = np.array([-1, 3, 2, 2], np.int64)
    inputs = [("e", TensorProto.FLOAT, [batch, dim]), ("s", TensorProto.FLOAT, [batch, style])]
    nodes = [
        helper.make_node("Concat", ["e", "s"], ["c"], axis=1),
        helper.make_node("MatMul", ["c", "weight"], ["m"]),
        helper.make_node("Tanh", ["m"], ["t"]),
        helper.make_node("Reshape", ["t", "shape"], ["image"]),
    ]
    if seeded:
        inputs.append(("n", TensorProto.INT64, [batch]))
    graph = helper.make_graph(
        nodes,
        "generator",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(shape, "shape")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"batch": 3}, {"seeded": True}])
def test_an_onnx_file_gives_what_its_graph_says(tmp_path, options):
    generator = open_generator(onnx_file(tmp_path / "g.onnx", **options), 8)
    assert isinstance(generator, OnnxGenerator)
    assert generator.style_size == 4
    assert generator.image_shape == (2, 2, 3)
    embedding, style, seed = arguments(7, 8, 4)
    weight = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
    want = torch.tanh(torch.cat([embedding, style], 1) @ torch.from_numpy(weight))
    want = (want.view(-1, 3, 2, 2).permute(0, 2, 3, 1) + 1) * 127.5
    got = generator.generate(embedding, style, seed)
    assert got.dtype == torch.uint8
    torch.testing.assert_close(got.float(), want, atol=0.501, rtol=0)
    synthesize(embedding, generator, tmp_path / "faces", 2)
    assert len(read_folder(tmp_path / "faces")) == 14


def test_onnx_files_that_cannot_be_used(tmp_path):
    path = onnx_file(tmp_path / "g.onnx")
    with pytest.raises(ValueError, match=r"embedding_size of .* is 8, got 9"):
        open_generator(path, 9)
    with pytest.raises(ValueError, match="does not state its style_size: give it"):
        open_generator(onnx_file(tmp_path / "free.onnx", style="S"), 8)
    with pytest.raises(ValueError, match=r"failed on embedding \(2, 8\) and style \(2, 5\)"):
        open_generator(tmp_path / "free.onnx", 8, style_size=5)
    with pytest.raises(ValueError, match=r"must return .* got float32 \(4, 3, 2, 2\) for B = 2"):
        open_generator(onnx_file(tmp_path / "wide.onnx", outputs=24), 8)
    with pytest.raises(ValueError, match=r"device must be one of .*CPU.* got 'cuda'"):
        open_generator(path, 8, device="cuda")
    with pytest.raises(ValueError, match=r"device must be one of .*CPU.* got 'nope'"):
        open_generator(path, 8, device="nope")
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(ValueError, match=f"{name} cannot be loaded as an ONNX model"):
            open_generator(tmp_path / name, 8)


@pytest.mark.parametrize("output", [np.array([["a"], ["b"]]), np.float32(1)])
def test_an_onnx_file_that_returns_no_images(tmp_path, monkeypatch, output):
    generator = open_generator(onnx_file(tmp_path / "g.onnx"), 8)

    class Session:
        def run(self, *_):
            return [output]

    monkeypatch.setattr(generator, "_session", Session())
    with pytest.raises(ValueError, match=r"g\.onnx failed on embedding \(3, 8\)"):
        generator.generate(*arguments(3, 8, 4))


def test_onnx_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r'g\.onnx needs onnxruntime.*pip install "synface-kernels\[onnx\]"'
    ):
        open_generator(tmp_path / "g.onnx", 8)
