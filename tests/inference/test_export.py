"""Exported files hold the network's computation, for any batch, or are not kept."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from synface.inference import Exporter, ExportError, FaceNetwork
from synface.models.iresnet import ChannelsLastConv2d, IResNet
from torch import nn

SHAPE = (16, 12, 3)
METADATA = {
    "image_size": [16, 12], "channels": 3, "color": "RGB", "embedding_size": 8, "flip": True,
    "step": 7,
}  # fmt: skip


def trained(shape=SHAPE, flip=True, widths=(4, 8), depths=(1, 2)):
    """Return a network whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    backbone = IResNet(shape[:2], shape[2], widths, depths, 8, dropout=0.2)
    for _ in range(3):
        backbone(torch.randn(9, shape[2], *shape[:2]))
    facts = {"source": "a/run", "step": 7, "backbone": "iresnet", "widths": list(widths)}
    return FaceNetwork(backbone, shape, 8, flip=flip, description=facts)


def images(count, shape=SHAPE):
    return np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)


@pytest.fixture(scope="module")
def exporter():
    return Exporter(trained(), images(12))


@pytest.fixture(scope="module")
def expected(exporter):
    with torch.no_grad():
        return exporter.network(torch.from_numpy(images(10)))


def loaded(kind, path):
    """Load a file without this library; return it as a function of images, and its metadata."""
    facts = {"synface.json": ""}
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        (given,), (found,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["N", *SHAPE])
        assert (found.name, found.type, found.shape) == ("embeddings", "tensor(float)", ["N", 8])
        stored = session.get_modelmeta().custom_metadata_map
        facts = {key: json.loads(value) for key, value in stored.items()}
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), facts
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
            run = torch.jit.load(str(path), _extra_files=facts)
    else:
        run = torch.export.load(path, extra_files=facts).module()
    return run, json.loads(facts["synface.json"])


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "torch-export"])
@pytest.mark.filterwarnings("error:.torch.jit:DeprecationWarning")
@pytest.mark.slow
def test_a_file_gives_the_networks_embeddings_for_any_batch(tmp_path, exporter, expected, kind):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / "network.pt2"
    difference = exporter.write(kind, path)
    assert 0 <= difference <= 1e-5
    assert [each.name for each in tmp_path.iterdir()] == ["network.pt2"]  # nothing beside it
    run, facts = loaded(kind, path)
    assert METADATA.items() <= facts.items()
    for count in (10, 7, 1):
        found = run(torch.from_numpy(images(10)[:count]))
        assert found.dtype == torch.float32
        assert (found - expected[:count]).abs().max() <= 1e-5
    assert not exporter.network.training


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "torch-export"])
@pytest.mark.filterwarnings("error:.torch.jit:DeprecationWarning")
@pytest.mark.slow
def test_a_file_of_a_network_in_channels_last_order_gives_its_embeddings(tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    # The fewest layers: exporting takes seconds for each.
    exporter = Exporter(trained(widths=(16,), depths=(1,)), images(12))
    first = exporter.network.backbone.stem[0]
    assert isinstance(first, ChannelsLastConv2d)
    path = tmp_path / "network.pt2"
    assert 0 <= exporter.write(kind, path) <= 1e-5
    run, _ = loaded(kind, path)
    batch = torch.from_numpy(images(7))
    with torch.no_grad():
        assert (run(batch) - exporter.network(batch)).abs().max() <= 1e-5


def test_weights_are_written_under_their_own_names(tmp_path, exporter):
    assert exporter.write("safetensors", tmp_path / "w.safetensors") <= 1e-5
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        facts = {key: json.loads(v) for key, v in file.metadata().items() if key != "format"}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert facts["backbone"] == "iresnet"
    assert facts["widths"] == [4, 8]
    assert (facts["image_size"], facts["step"]) == ([16, 12], 7)
    assert not {"source", "flip"} & facts.keys()
    backbone = exporter.network.backbone.state_dict()
    assert weights.keys() == backbone.keys()
    assert all(torch.equal(weights[name], value) for name, value in backbone.items())
    other = Exporter(FaceNetwork(exporter.network.backbone, SHAPE, 8))  # of no run
    assert other.write("safetensors", tmp_path / "other.safetensors") <= 1e-5


def test_without_the_flip_and_in_gray(tmp_path):
    network = trained((8, 8, 1), flip=False)
    assert Exporter(network).write("torchscript", tmp_path / "x.ts") <= 1e-5
    run, facts = loaded("torchscript", tmp_path / "x.ts")
    assert (facts["flip"], facts["color"]) == (False, "grayscale")
    x = torch.from_numpy(images(4, (8, 8, 1)))
    assert network.training  # the exporter has a copy of its own
    assert (run(x) - network.eval()(x)).abs().max() <= 1e-5
    assert (run(x) - run(x.flip(2))).abs().max() > 1e-3


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, exporter, monkeypatch, change):
    path = tmp_path / "x.ts"
    load = torch.jit.load

    def changed(*given, **options):
        run = load(*given, **options)
        return lambda x: run(x) + (change if len(x) == 3 else 0)  # in one of the batches alone

    monkeypatch.setattr(torch.jit, "load", changed)
    with pytest.raises(ExportError, match=rf"{path} was not written: .* up to (0\.001|nan), more"):
        exporter.write("torchscript", path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError):
        exporter.write("torchscript", path)
    assert path.read_bytes() == b"earlier"


class Odd(nn.Module):
    """A backbone with code of the user's."""

    def __init__(self, rows):
        super().__init__()
        self.last, self.rows = nn.Linear(3 * 16 * 12, 8), rows

    def forward(self, x):
        return self.rows(self.last(x.flatten(1)), x)


def test_a_backbone_that_torch_cannot_export_is_an_error_of_its_own(tmp_path):
    def choose(rows, x):
        return rows if x.sum() > 0 else -rows

    network = FaceNetwork(Odd(choose), SHAPE, 8)
    with pytest.raises(ExportError, match=r"torch\.export cannot export this network: \w+"):
        Exporter(network).write("torch-export", tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda rows, x: rows - rows.mean(0), "embeddings of the exported torchscript file differ"),
        (lambda rows, x: rows + rows.new_ones(x.detach().numpy().shape[0], 1), "fails on a batch"),
    ],
)
def test_a_backbone_whose_file_depends_on_the_batch_is_not_kept(tmp_path, rows, message):
    with pytest.raises(ExportError, match=message):
        Exporter(FaceNetwork(Odd(rows), SHAPE, 8)).write("torchscript", tmp_path / "x.ts")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_output_is_not_kept(tmp_path, exporter, monkeypatch):
    program = SimpleNamespace(module=lambda: lambda x: torch.zeros(len(x), 9))
    monkeypatch.setattr(torch.export, "load", lambda *_: program)
    with pytest.raises(ExportError, match=r"shape \(10, 9\), expected \(10, 8\)"):
        exporter.write("torch-export", tmp_path / "x.pt2")


def test_other_arguments_are_errors(tmp_path, exporter):
    with pytest.raises(ValueError, match="kind must be one of onnx, torchscript, torch-export, s"):
        exporter.write("caffe", tmp_path / "x")
    for wrong in (images(2).astype(np.float32), images(2, (8, 8, 3)), images(0)):
        with pytest.raises(ValueError, match=r"images must be uint8 of shape \(M, 16, 12, 3\)"):
            Exporter(exporter.network, wrong)
    with pytest.raises(OSError, match="No such file"):
        exporter.write("torch-export", tmp_path / "gone" / "x.pt2")
