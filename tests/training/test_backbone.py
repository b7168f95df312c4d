"""Any module trains as a backbone, and code that a file names is not imported by itself."""

import sys
from dataclasses import replace

import pytest
import torch
from synface.common.files import CheckpointError
from synface.data import embedded_faces
from synface.evaluation.embedding import embed
from synface.training.loop import TrainConfig, load_backbone, train
from synface.training.model import check_network
from torch import nn

from tests.helpers.command_line import call, refused
from tests.helpers.ranks import on_ranks
from tests.helpers.training import SMALL, TINY, folder, same, score, state

NETS = """
import torch
from torch import nn

def conv(image_size, channels, embedding_size):
    assert image_size == (16, 16)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(4 * 7 * 7, embedding_size),
    )

class Wide:
    conv = staticmethod(lambda **options: conv(**options | {"embedding_size": 3}))

def number(image_size, channels, embedding_size):
    return 3

def positional(size):
    raise NotImplementedError
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Write a module of the user's, that imports as "users_nets", and return its name."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "users_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield "users_nets"
    sys.modules.pop("users_nets", None)


@pytest.fixture(scope="module")
def faces():
    return embedded_faces(images_per_identity=4, size=16, identities=6)


class Net(nn.Module):
    """A module that is not made for faces."""

    def __init__(self, dimension=16):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU())
        self.last = nn.Linear(8, dimension)

    def forward(self, images):
        return self.last(self.layers(images))


def net(dimension=16):
    torch.manual_seed(1)
    return Net(dimension)


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16", "sample_rate": 0.5}], ids=str)
def test_a_module_trains_resumes_bitwise_and_is_read_back(faces, tmp_path, options):
    config = replace(SMALL, **options)
    whole = train(config, faces, tmp_path / "whole", backbone=net())
    assert isinstance(whole.backbone, Net)
    assert whole.config.backbone == "module"
    train(config, faces, tmp_path / "cut", backbone=net(), stop_after=2)
    resumed = train(config, faces, tmp_path / "cut", backbone=net(), resume=True)
    assert same(state(whole), state(resumed))
    assert whole.history == resumed.history
    read, found = load_backbone(tmp_path / "cut", net())
    assert torch.equal(embed(read, faces.images), embed(whole.backbone, faces.images))
    assert not read.training
    assert found["config"]["backbone"] == "module"


class Tied(nn.Module):
    """Two layers with one weight, which a checkpoint names twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(256, 256), nn.Linear(256, 256)
        self.two.weight, self.last = self.one.weight, nn.Linear(256, 16)

    def forward(self, images):
        return self.last(self.two(self.one(images.flatten(1)).relu()))


def test_tied_weights_resume_bitwise_and_stay_tied(faces, tmp_path):
    config = replace(SMALL, lr=0.01)
    whole = train(config, faces, tmp_path / "whole", backbone=Tied())
    train(config, faces, tmp_path / "cut", backbone=Tied(), stop_after=2)
    resumed = train(config, faces, tmp_path / "cut", backbone=Tied(), resume=True)
    assert same(state(whole), state(resumed))
    read, _ = load_backbone(tmp_path / "cut", Tied())
    assert read.one.weight is read.two.weight
    assert same(read.state_dict(), whole.backbone.state_dict())


class Ranked:
    """Train a module on each rank, and once more with an interruption; return both backbones."""

    def __init__(self, output):
        self.output = output

    def __call__(self, rank, ranks):
        images = embedded_faces(images_per_identity=4, size=16, identities=6)
        config, cut = replace(SMALL, batch_size=12), self.output / "cut"
        whole = train(config, images, self.output / "whole", backbone=net())
        train(config, images, cut, backbone=net(), stop_after=2)
        resumed = train(config, images, cut, backbone=net(), resume=True)
        return whole.backbone.state_dict(), resumed.backbone.state_dict()


def test_ranks_train_a_module(tmp_path):
    for whole, resumed in on_ranks(2, Ranked(tmp_path), tmp_path / "ranks"):
        assert same(whole, resumed)
    read, _ = load_backbone(tmp_path / "cut", net())
    assert torch.equal(read.last.weight, resumed["last.weight"])


def test_a_module_s_run_asks_for_the_module(faces, tmp_path):
    train(SMALL, faces, tmp_path / "run", backbone=net(), stop_after=0)
    with pytest.raises(CheckpointError, match=r"is a module passed to train\(\).*backbone="):
        load_backbone(tmp_path / "run")
    with pytest.raises(CheckpointError, match="config's backbone is 'module', expected 'iresnet'"):
        train(SMALL, faces, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match=r"\(B, embedding_size = 16\) embeddings, got"):
        load_backbone(tmp_path / "run", net(8))
    with pytest.raises(CheckpointError, match=r"of another model: 1\.bias is missing"):
        load_backbone(tmp_path / "run", nn.Sequential(nn.Flatten(), nn.LazyLinear(16)))
    with pytest.raises(ValueError, match=r"'module': give the module, as train\(..., backbone="):
        train(replace(SMALL, backbone="module"), faces, tmp_path / "other")
    message = refused("eval", tmp_path / "run")
    assert "give --backbone package.module:function" in message


def test_a_run_begins_with_a_module_s(faces, tmp_path):
    before = train(SMALL, faces, tmp_path / "a", backbone=net())
    options = {"backbone": net(), "init": tmp_path / "a", "stop_after": 0}
    config = replace(SMALL, lr=1e-30, weight_decay=0.0)
    begun = train(config, faces, tmp_path / "b", **options)
    assert torch.equal(begun.backbone.last.weight, before.backbone.last.weight)
    assert torch.equal(begun.head.weight, before.head.weight)
    with pytest.raises(CheckpointError, match=r"of another model.*or its backbone"):
        train(SMALL, faces, tmp_path / "c", init=tmp_path / "a")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (net(8), r"\(B, 1, 16, 16\) images to \(B, embedding_size = 16\) .* \(2, 8\).* for B = 2"),
        (nn.Identity(), r"got float32 \(2, 1, 16, 16\)"),
        (nn.Conv2d(3, 16, 16), r"cannot embed images of shape \(2, 1, 16, 16\): .* channels"),
    ],
    ids=["another dimension", "images", "other channels"],
)
def test_a_module_that_does_not_embed_is_refused_before_the_run(faces, tmp_path, module, message):
    modes = [each.train(i > 0).training for i, each in enumerate(module.modules())]
    with pytest.raises(ValueError, match=message):
        train(SMALL, faces, tmp_path / "run", backbone=module)
    assert not (tmp_path / "run").exists()
    assert [each.training for each in module.modules()] == modes


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_function_trains_and_is_imported_only_where_it_is_named(tmp_path, nets):
    spec, run, data = f"{nets}:conv", tmp_path / "run", folder(tmp_path / "faces")
    given = ["--data", data, "--holdout", 2, *TINY, "--backbone", spec]
    found = score(call("train", *given, "--epochs", 2, "--output", run))
    weights = load_backbone(run, spec)[0].state_dict()
    assert len(weights) == 9
    sys.modules.pop(nets)  # nothing of what follows imports it by itself
    not_imported = f"its backbone is {spec}, and code that a"
    assert not_imported in refused("eval", run)
    assert not_imported in refused("train", "--resume", run)
    with pytest.raises(CheckpointError, match=not_imported):
        load_backbone(run)
    assert nets not in sys.modules

    assert score(call("eval", run, "--backbone", spec)) == found
    assert score(call("train", "--resume", run, "--backbone", spec)) == found
    other = refused("train", "--resume", run, "--backbone", f"{nets}:number")
    assert f"--backbone {nets}:number differs from the run's {spec}" in other
    begun = call("train", *given, "--init", run, "--output", tmp_path / "next")
    assert "starts from the backbone" in begun
    assert "another model" in refused("eval", run, "--backbone", "iresnet18")


def test_a_function_resumes_bitwise(faces, tmp_path, nets):
    config = replace(SMALL, backbone=f"{nets}:conv")
    whole = train(config, faces, tmp_path / "whole")
    train(config, faces, tmp_path / "cut", stop_after=2)
    assert same(state(whole), state(train(config, faces, tmp_path / "cut", resume=True)))
    before = torch.get_rng_state()
    read, _ = load_backbone(tmp_path / "cut", config.backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(read.state_dict(), whole.backbone.state_dict())
    module = load_backbone(tmp_path / "cut", nn.Sequential(*read))[0]
    assert same(module.state_dict(), read.state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_nets:none", "users_nets:none cannot be imported: .*no attribute 'none'"),
        ("no_such_package.nets:conv", "cannot be imported: No module named.*PYTHONPATH"),
        ("users_nets:number", "users_nets:number must return a torch.nn.Module, got int 3"),
        ("users_nets:positional", "must take the keyword arguments image_size=.H, W., channels"),
        ("users_nets:Wide.conv", r"\(B, embedding_size = 16\) embeddings, got float32 \(2, 3\)"),
        ("users_nets", "backbone must be one of iresnet, .* or a package.module:function, got"),
        ("../nets:conv", "backbone must be one of iresnet"),
        ("iresnet19", "backbone must be one of iresnet"),
    ],
)
def test_a_function_that_builds_no_backbone_is_named(faces, tmp_path, nets, name, message):
    with pytest.raises(ValueError, match=message):
        train(replace(SMALL, backbone=name), faces, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_that_a_backbone_does_not_take_are_refused(tmp_path, nets):
    for backbone, option in (
        ("iresnet18", ["--widths", "4,8"]),
        (f"{nets}:conv", ["--depths", "1,1"]),
        (f"{nets}:conv", ["--dropout", 0.5]),
    ):
        message = refused("train", "--backbone", backbone, *option, "--output", tmp_path / "run")
        assert f"{option[0]} has no effect with --backbone {backbone}" in message


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_preset_trains_and_evaluates_by_its_name(tmp_path):
    data, run = folder(tmp_path / "faces"), tmp_path / "run"
    options = ["--data", data, "--holdout", 2, *TINY, "--backbone", "iresnet18"]
    found = score(call("train", *options, "--output", run))
    assert 'backbone = "iresnet18"' in (run / "config.toml").read_text()
    assert score(call("eval", run)) == found
    backbone, _ = load_backbone(run)
    assert backbone.layer4[1].conv2.weight.shape == (512, 512, 3, 3)


def test_a_network_of_a_preset_is_looked_at_first():
    config = TrainConfig(backbone="iresnet100", embedding_size=512)
    network = check_network(config, (112, 112, 3))
    assert sum(each.numel() for each in network.parameters()) == 65_156_160
    message = r"iresnet100 with embedding_size 1099511627776 for images of 112×112 would take"
    with pytest.raises(ValueError, match=message):
        check_network(replace(config, embedding_size=1 << 40), (112, 112, 3))


def test_a_configuration_without_a_backbone_is_recorded_as_before(faces, tmp_path):
    """The files of a run that needs no such key are those of earlier versions."""
    train(SMALL, faces, tmp_path / "run", stop_after=0)
    assert "backbone" not in (tmp_path / "run" / "config.json").read_text()
    assert "backbone" not in SMALL.to_json()
    assert TrainConfig.from_json(SMALL.to_json()) == SMALL
    preset = replace(SMALL, backbone="iresnet50")
    assert TrainConfig.from_json(preset.to_json()) == preset
