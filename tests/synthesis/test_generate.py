"""Generators, embedded and from files, and the image folders that they fill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from synface.data import Faces, embedded_faces, read_folder
from synface.data.embedded import FACES, lfw_crops
from synface.evaluation.metrics import pixel_embeddings, verify
from synface.synthesis import synthesize as synthesize_module
from synface.synthesis.dataset import MANIFEST, synthesize
from synface.synthesis.embeddings import read_embeddings
from synface.synthesis.generators import (
    EigenfaceGenerator,
    OnnxGenerator,
    TorchScriptGenerator,
    open_generator,
)


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def arguments(count: int, dim: int, style: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed + 1)
    return unit(count, dim, seed), torch.randn(count, style, generator=g), torch.arange(count)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


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
    """As surely as images of the real crops do, of which the style is varied as much."""

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
        open_generator(None, 8, style_size=3)
    with pytest.raises(ValueError, match="size is for the eigenfaces"):
        open_generator("x.pt", 8, size=48)


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


class Noisy(torch.nn.Module):
    """Draws from the global generator, returns bytes, and shows the seed in the first pixel."""

    def forward(
        self, embedding: torch.Tensor, style: torch.Tensor, seed: torch.Tensor
    ) -> torch.Tensor:
        images = torch.randint(0, 256, [len(seed), 4, 4, 1]).to(torch.uint8)
        images[:, 0, 0, 0] = seed.to(torch.uint8)
        return images


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


def scripted(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module.eval()).save(str(path))
    return path


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


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
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3\), before of \(4, 4, 3\)"):
        generator.generate(*arguments(3, 8, 4))


class OneArgument(torch.nn.Module):
    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding


def test_torchscript_files_that_cannot_be_used(tmp_path):
    path = scripted(Tiny(8, 4), tmp_path / "g.pt")
    with pytest.raises(ValueError, match="does not say its embedding_size: give it"):
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


# -- ONNX


def onnx_file(path: Path, dim=8, style=4, batch="B", seeded=False, outputs=12) -> Path:
    """[embedding, style] @ weight, through tanh, as (B, 3, 2, 2)."""
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
    with pytest.raises(ValueError, match="does not say its style_size: give it"):
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


# -- embeddings from files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_are_read(tmp_path, dtype):
    rows = torch.randn(5, 3).to(dtype)
    save_file({"anything": rows}, tmp_path / "one.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "one.safetensors"), rows.float())
    save_file({"embeddings": rows, "other": rows[:1].clone()}, tmp_path / "two.safetensors")
    assert torch.equal(read_embeddings(tmp_path / "two.safetensors"), rows.float())
    if dtype != torch.bfloat16:
        for i, array in enumerate((rows.numpy(), np.asfortranarray(rows), rows.numpy()[::-1])):
            np.save(tmp_path / f"{i}.npy", array)
            got = read_embeddings(tmp_path / f"{i}.npy")
            assert torch.equal(got, torch.from_numpy(array.astype(np.float32)))


def npy(array, **options):
    return lambda path: np.save(path, array, **options)


def tensors(**named):
    return lambda path: save_file(named, path)


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def header(text: str):
    return content(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)
    )


DESCRIBED = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}"
LIE = (
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 512), }"
)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.npy", None, "cannot be read: No such file"),
        ("x.txt", content(b""), r"expected a \.safetensors or \.npy file, got '\.txt'"),
        ("x.npy", content(b""), "not a whole .npy array"),
        ("x.npy", content(LIE.ljust(127) + b"\n" + bytes(64)), "not a whole .npy array"),
        ("x.npy", header("(" * 5000), "not a whole .npy array"),
        ("x.npy", header("-" * 9000), "not a whole .npy array"),
        ("x.npy", header("{[]: 1}"), "not a whole .npy array"),
        ("x.npy", header(DESCRIBED.format("'<f4'", "(True, 2)")), "not a whole .npy array"),
        ("x.npy", header(DESCRIBED.format("()", "(1, 2)")), "not a whole .npy array"),
        ("x.npy", npy(np.array([{}]), allow_pickle=True), "not a whole .npy array"),
        ("x.npy", lambda p: np.savez(p.open("wb"), a=np.eye(2)), "an archive of arrays"),
        ("x.npy", npy(np.arange(6).reshape(2, 3)), r"floating point .* got int64 \(2, 3\)"),
        ("x.npy", npy(np.ones(6)), r"shape \(N, D\), got float32 \(6,\)"),
        ("x.npy", npy(np.ones((0, 6))), r"got float32 \(0, 6\)"),
        ("x.npy", npy(np.array([[1.0, 2], [np.nan, 1]])), "1 of 2 rows are not finite.* row 1"),
        ("x.npy", npy(np.array([[1e300, 2]])), "1 of 1 rows are not finite in float32"),
        ("x.npy", npy(np.array([[1.0], [0], [0]])), "2 of 3 rows are zero .* row 1"),
        ("x.safetensors", content(b"\xff" * 99), "is not a safetensors file"),
        ("x.safetensors", None, "cannot be read"),
        ("x.safetensors", tensors(a=torch.ones(2), b=torch.ones(1)), r"got 2 \(a, b\)"),
        ("x.safetensors", tensors(a=torch.ones(2, 2).int()), r"got int32 \(2, 2\)"),
    ],
)
def test_embeddings_that_cannot_be_read(tmp_path, name, make, message):
    if make:
        make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / name)


@given(st.data(), st.sampled_from([".npy", ".safetensors"]))
def test_damaged_embeddings_raise_nothing_but_a_value_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    rows = torch.ones(4, 3)
    np.save(path, rows.numpy()) if suffix == ".npy" else save_file({"e": rows}, path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        message = f"{path.name} {read_embeddings(path).ndim}"
    except ValueError as error:
        message = str(error)
    assert path.name in message


# -- the folder


def test_the_folder_holds_every_image_of_every_identity(tmp_path):
    embeddings, generator = unit(5, 16), EigenfaceGenerator(16, 24)
    seen: list[tuple[int, int]] = []
    made = synthesize(embeddings, generator, tmp_path / "a", 3, progress=lambda *x: seen.append(x))
    assert made == 15
    assert seen == [(i, 15) for i in range(16)]
    faces = read_folder(tmp_path / "a")
    assert faces.identities == [f"{i:06d}" for i in range(5)]
    assert faces.labels.tolist() == [i for i in range(5) for _ in range(3)]
    assert faces.images.shape == (15, 24, 24, 1)
    assert len(torch.unique(faces.images.flatten(1), dim=0)) == 15  # no image comes twice
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["generator"] == generator.description
    assert manifest["embeddings"]["shape"] == [5, 16]

    # The same images whatever the batches, the workers and the number of identities and images.
    synthesize(embeddings[:3], generator, tmp_path / "b", 5, batch_size=4, workers=1)
    other = read_folder(tmp_path / "b")
    assert torch.equal(other.images.view(3, 5, 24, 24)[:, :3], faces.images.view(5, 3, 24, 24)[:3])
    synthesize(3.0 * embeddings.half(), generator, tmp_path / "c", 3, seed=1, workers=5)
    assert not torch.equal(read_folder(tmp_path / "c").images, faces.images)


class Interrupted(EigenfaceGenerator):
    """Raises once it was called so many times."""

    def __init__(self, calls: int, error: BaseException):
        super().__init__(16, 24)
        self.calls, self.error = calls, error

    def generate(self, *arguments):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return super().generate(*arguments)


@pytest.mark.parametrize("scale", [2.0**84, 2.0**-50, 2.0**-100])
def test_faces_depend_on_directions_alone(tmp_path, scale):
    generator = EigenfaceGenerator(16, 24)
    synthesize(unit(3, 16), generator, tmp_path / "a", 2)
    synthesize(unit(3, 16) * scale, generator, tmp_path / "b", 2)
    faces, scaled = (read_folder(tmp_path / name) for name in "ab")
    assert torch.equal(faces.images, scaled.images)


class Careless(EigenfaceGenerator):
    """Its images, changed."""

    def __init__(self, change):
        super().__init__(16, 24)
        self.change = change

    def generate(self, *arguments):
        return self.change(super().generate(*arguments))


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda images: images.numpy(), "ndarray"),
        (lambda images: images.float(), r"float32 \(6, 24, 24, 1\) on cpu"),
        (lambda images: images[1:], r"uint8 \(5, 24, 24, 1\) on cpu"),
        (lambda images: images.permute(0, 3, 1, 2), r"uint8 \(6, 1, 24, 24\) on cpu"),
        (lambda images: images.to("meta"), r"uint8 \(6, 24, 24, 1\) on meta"),
    ],
)
def test_what_a_generator_returns_is_checked(tmp_path, change, came):
    message = rf"generator must return uint8 \(6, 24, 24, 1\) on cpu, got {came}"
    with pytest.raises(ValueError, match=message):
        synthesize(unit(3, 16), Careless(change), tmp_path / "x", 2)
    assert list(tree(tmp_path / "x")) == [MANIFEST]


def test_a_resumed_folder_is_bitwise_the_same(tmp_path):
    embeddings, options = unit(9, 16), {"images_per_identity": 4, "batch_size": 5}
    generator = EigenfaceGenerator(16, 24)
    synthesize(embeddings, generator, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        synthesize(embeddings, Interrupted(5, KeyboardInterrupt()), tmp_path / "x", **options)
    left = tree(tmp_path / "x")
    assert 10 < len(left) < 36
    (tmp_path / "x" / "000000" / "002.png").unlink()  # inside a batch that was done
    (tmp_path / "x" / "000001" / ".003.png.part").write_bytes(b"cut sh")
    (tmp_path / "x" / "000001" / "003.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*.png")}
    made = synthesize(embeddings, generator, tmp_path / "x", **options, resume=True)
    assert made == 36 - len(before)
    assert tree(tmp_path / "x") == tree(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())  # none made twice
    assert synthesize(embeddings, generator, tmp_path / "x", **options, resume=True) == 0


def test_a_model_whose_rounding_depends_on_the_batch_resumes_bitwise_too(tmp_path):
    path = scripted(Noisy(), tmp_path / "g.pt")  # here all of an image depends on its batch
    generator = TorchScriptGenerator(path, 16, 2)
    synthesize(unit(6, 16), generator, tmp_path / "whole", 3, batch_size=4)
    synthesize(unit(6, 16), generator, tmp_path / "x", 3, batch_size=4)
    for gone in ("000001/000.png", "000005/002.png"):
        (tmp_path / "x" / gone).unlink()
    assert synthesize(unit(6, 16), generator, tmp_path / "x", 3, batch_size=4, resume=True) == 2
    assert tree(tmp_path / "x") == tree(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from synface.synthesis.generators import EigenfaceGenerator
from synface.synthesis.embeddings import read_embeddings
from synface.synthesis.dataset import synthesize
rows = read_embeddings(sys.argv[1])
synthesize(rows, EigenfaceGenerator(16, 24), Path(sys.argv[2]), 40, batch_size=16)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_9_leaves_whole_images_alone(tmp_path):
    rows = unit(60, 16)
    np.save(tmp_path / "rows.npy", rows.numpy())
    root = tmp_path / "x"
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "rows.npy", root])
    deadline = time.monotonic() + 120
    while not (root / "000004").exists():
        assert child.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = [image for image in root.rglob("*.png") if image.name[0] != "."]
    assert 100 < len(left) < 2400
    for image in left:
        with Image.open(image) as opened:
            opened.load()
    made = synthesize(rows, EigenfaceGenerator(16, 24), root, 40, batch_size=16, resume=True)
    assert made == 2400 - len(left)
    synthesize(rows, EigenfaceGenerator(16, 24), tmp_path / "whole", 40, batch_size=16)
    assert tree(root) == tree(tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    whole, generator = tmp_path / "whole", EigenfaceGenerator(16, 24)
    synthesize(unit(6, 16), generator, whole, 4, batch_size=4)
    written, replace = [], Path.replace

    def full(self, target):
        if len(written) >= 9 and self.suffix == ".part":
            raise OSError(28, "No space left on device")
        written.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device, after \d of 24 images"):
        synthesize(unit(6, 16), generator, tmp_path / "x", 4, batch_size=4, workers=1)
    monkeypatch.undo()
    left = tree(tmp_path / "x")
    assert len(left) == 9
    assert not [name for name in left if name.endswith(".part")]
    assert synthesize(unit(6, 16), generator, tmp_path / "x", 4, batch_size=4, resume=True) == 16
    assert tree(tmp_path / "x") == tree(whole)


def test_what_is_there_is_not_lost_by_mistake(tmp_path):
    generator, root = EigenfaceGenerator(16, 24), tmp_path / "x"
    synthesize(unit(4, 16), generator, root, 2)
    before = tree(root)
    for changes, message in (
        ({}, r"was synthesized before: resume it \(--resume\) or replace it \(--overwrite\)"),
        ({"resume": True, "seed": 1}, "its seed is 0, expected 1"),
        ({"resume": True, "images_per_identity": 3}, "its images_per_identity is 2, expected 3"),
        ({"resume": True, "batch_size": 3}, "its batch_size is 64, expected 3"),
        ({"resume": True, "embeddings": unit(4, 16, seed=1)}, "its embeddings is"),
        ({"resume": True, "generator": EigenfaceGenerator(16, 25)}, "its generator is"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"images_per_identity": 0}, "images_per_identity must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"embeddings": unit(4, 15)}, r"of shape \(N, 16\), as the generator .* \(4, 15\)"),
        ({"embeddings": torch.zeros(4, 16)}, "embeddings: 4 of 4 rows are zero"),
    ):
        given = {"embeddings": unit(4, 16), "generator": generator, "images_per_identity": 2}
        with pytest.raises((ValueError, FileExistsError), match=message):
            synthesize(output=root, **(given | changes))
        assert tree(root) == before
    (root / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"synthesis\.json is damaged"):
        synthesize(unit(4, 16), generator, root, 2, overwrite=True)
    (root / MANIFEST).unlink()
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="was not synthesized"):
            synthesize(unit(4, 16), generator, root, 2, **options)


def test_overwriting_leaves_only_the_new_identities(tmp_path):
    generator, root = EigenfaceGenerator(16, 24), tmp_path / "x"
    synthesize(unit(4, 16), generator, root, 3)
    (root / "notes.txt").write_text("mine")
    synthesize(unit(2, 16), generator, root, 2, overwrite=True)
    assert (root / "notes.txt").read_text() == "mine"
    (root / "notes.txt").unlink()
    synthesize(unit(2, 16), generator, tmp_path / "new", 2)
    assert tree(root) == tree(tmp_path / "new")


def test_a_folder_whose_manifest_was_never_finished_is_empty(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"{MANIFEST}.part").write_text("{")
    assert synthesize(unit(2, 16), EigenfaceGenerator(16, 24), tmp_path / "x", 1, resume=True) == 2


def test_draws_of_different_images_are_unlike():
    many = np.arange(4000)
    style, seed = synthesize_module.styles(0, many // 20, many % 20, 10)
    assert len(seed.unique()) == 4000
    assert seed.min() >= 0
    assert style.mean().abs() < 0.02
    assert style.std() == pytest.approx(1.0, abs=0.02)
    lag = torch.corrcoef(torch.stack([style[:-1].flatten(), style[1:].flatten()]))[0, 1]
    assert lag.abs() < 0.02


# -- the command


def synface(*arguments, cwd):
    command = [sys.executable, "-m", "synface", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ)


def test_from_packed_embeddings_to_a_trained_network(tmp_path):
    save_file({"embeddings": unit(8, 32)}, tmp_path / "packed.safetensors")
    made = ["synthesize", "--packed", "packed.safetensors", "--images-per-identity", 4]
    made += ["--size", "24x24", "--output", "faces"]
    done = synface(*made, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 identities, 4 images of each in faces: 32 made" in done.stdout
    assert "images/s" in done.stdout
    assert read_folder(tmp_path / "faces").images.shape == (32, 24, 24, 1)
    tiny = ["--epochs", 2, "--batch-size", 8, "--size", "16x16", "--embedding-size", 8]
    trained = synface(
        "train", "--data", "faces", "--holdout", 4, "--output", "run", *tiny, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "16 images of 4 people" in trained.stdout
    assert "ROC-AUC: trained" in trained.stdout

    for options, message in (
        ([], "--resume) or replace it (--overwrite)"),
        (["--resume", "--seed", 1], "its seed is 0, expected 1"),
        (["--generator", "g.pt"], "size is for the eigenfaces"),
        (["--packed", "packed.pt"], "expected a .safetensors or .npy file, got '.pt'"),
        (["--packed", "missing.npy"], "missing.npy cannot be read"),
        (["--size", "24x20"], "the eigenfaces are square, got --size 24x20"),
    ):
        done = synface(*made, *options, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in " ".join(done.stdout.split())
        assert "Traceback" not in done.stdout + done.stderr
