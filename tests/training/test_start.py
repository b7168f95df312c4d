"""The start of a run: files of weights, heads kept or resized, frozen epochs, rates by parts."""

import importlib.util
import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synface import checkpoint
from synface.common.files import CheckpointError
from synface.data import embedded_faces
from synface.models.iresnet import IResNet, PublishedIResNet, insightface_names
from synface.training import TrainConfig, train
from synface.training.backbone import build_backbone
from synface.training.initial import architecture_of, fitted, network_of_weights, read_weights

from tests.helpers import torchvision_stand_in
from tests.helpers.command_line import call, refused
from tests.helpers.forked import finished
from tests.helpers.ranks import on_ranks
from tests.helpers.training import SMALL, folder, same, state

ROOT = Path(__file__).parents[2]
SIZES = {"widths": (4, 8), "depths": (2, 1), "embedding_size": 16}
CONFIG = replace(SMALL, **SIZES)


def people(identities: int = 6):
    return embedded_faces(images_per_identity=4, size=16, identities=identities)


def network(seed: int = 0, **sizes) -> IResNet:
    """Return a small IResNet for the tests' images, with statistics as if it were trained."""
    torch.manual_seed(seed)
    shape = {"image_size": (16, 16), "channels": 1} | SIZES | sizes
    made = IResNet(**shape)
    for name, buffer in made.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    return made.eval()


def published(made: IResNet) -> dict[str, torch.Tensor]:
    """Return the state dict of a network by insightface's names."""
    names = insightface_names(made.state_dict())
    return {names[name]: value for name, value in made.state_dict().items()}


def test_insightface_names_are_those_of_the_published_network():
    depths = (2, 1, 3, 1)
    ours = IResNet((32, 32), 3, PublishedIResNet.WIDTHS, depths, 32)
    theirs = PublishedIResNet(depths, (32, 32), 3, 32)
    assert sorted(insightface_names(ours.state_dict()).values()) == sorted(theirs.state_dict())
    assert insightface_names(theirs.state_dict()) == {k: k for k in theirs.state_dict()}
    theirs.load_state_dict(published(ours))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(theirs.eval()(images), ours.eval()(images))


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
@pytest.mark.parametrize("nested", [None, "state_dict", "state_dict_backbone"])
@pytest.mark.parametrize("names", ["own", "insightface"])
def test_a_file_of_weights_loads_however_a_trainer_named_them(tmp_path, prefix, nested, names):
    made = network()
    values = published(made) if names == "insightface" else made.state_dict()
    values = OrderedDict((prefix + name, value) for name, value in values.items())
    if prefix:
        values["head.weight"] = torch.rand(3, 16)  # not the backbone's
    torch.save({nested: values, "epoch": 3} if nested else values, tmp_path / "w.pth")
    found = fitted(tmp_path / "w.pth", read_weights(tmp_path / "w.pth"), network(1))
    assert same(found, dict(made.state_dict()))
    loaded, sizes, size = network_of_weights(tmp_path / "w.pth")
    assert (size, sizes.channels, sizes.embedding_size) == ((16, 16), 1, 16)
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded(images), made(images))


def test_weights_of_old_files_and_of_other_precisions_load(tmp_path):
    made = network()
    values = {k: v for k, v in published(made).items() if "num_batches" not in k}
    half = {k: v.half() for k, v in values.items()}
    torch.save(half, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    found = fitted(tmp_path / "w.pt", read_weights(tmp_path / "w.pt"), network(1))
    counters = [k for k in found if "num_batches" in k]
    assert counters
    assert all(found[k].equal(torch.tensor(0)) for k in counters)
    assert all(found[k].dtype == v.dtype for k, v in made.state_dict().items())
    assert torch.equal(found["stem.0.weight"], made.stem[0].weight.half().float())


def test_an_architecture_is_read_from_weights():
    sizes = architecture_of("w", published(network()))
    assert sizes[:4] == ((4, 8), (2, 1), 16, 1)
    assert sizes.image_size == (16, 16)
    assert architecture_of("w", {"a.weight": torch.zeros(2)}) is None
    with torch.device("meta"):
        preset = PublishedIResNet((3, 4, 14, 3), (112, 112), 3, 512)
    options = architecture_of("w", preset.state_dict()).options()
    assert options.startswith("--backbone iresnet50 --embedding-size 512 --size 112x112")


def test_weights_of_another_architecture_name_what_is_wrong(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(published(network(depths=(1, 2), widths=(4, 6))), file)
    weights = read_weights(file)
    with pytest.raises(CheckpointError) as error:
        fitted(file, weights, network())
    said = str(error.value)
    assert said.startswith(f"{file} has the weights of another architecture: missing: stages.1.")
    assert "left over: layer2.1." in said
    assert "must be of shape (8, 4, 3, 3), got (6, 4, 3, 3)" in said
    assert "these weights need --widths 4,6 --depths 1,2 --embedding-size 16 --size 16x16" in said
    with pytest.raises(CheckpointError, match=r"missing: a\.weight, a\.bias; left over: .* more"):
        fitted(file, weights, torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4)}))
    other = {f"module.{name}": value for name, value in network().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"left over: layer1\.1\..*; these weights need"):
        fitted(file, other, PublishedIResNet((1, 1, 1, 1), (16, 16), 1, 16))


@pytest.mark.parametrize("name", ["w.txt", "w.pth", "w.safetensors"])
def test_a_file_that_holds_no_weights_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=f"{name} (must be a run's folder|cannot be read)"):
        read_weights(tmp_path / name)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_nothing_in_a_file_of_weights_is_executed(tmp_path):
    for zipped in (True, False):
        torch.save({"a": Hostile()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="cannot be read as weights: it holds more than"):
            read_weights(tmp_path / "w.pth")
    for content in ([torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}, {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="must hold tensors by name"):
            read_weights(tmp_path / "w.pth")


def test_weights_of_two_networks_are_refused(tmp_path):
    values = {
        f"{name}.{k}": v for name in ("online", "target") for k, v in network().state_dict().items()
    }
    torch.save(values | {"temperature": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"several networks, under 'online\.', 'target\.'"):
        fitted(tmp_path / "w.pth", read_weights(tmp_path / "w.pth"), network())


def test_a_state_dict_beside_other_tensors_is_found(tmp_path):
    values = {"epoch": torch.tensor(3), "state_dict": network().state_dict()}
    torch.save(values, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), dict(network().state_dict()))
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="must hold tensors by name"):
        read_weights(tmp_path / "w.pth")


def test_weights_of_a_resnet_are_not_taken_for_an_iresnet():
    """Torchvision's ResNets name their layers alike."""
    values = {k: v for k, v in published(network()).items() if "prelu" not in k}
    assert architecture_of("w", values) is None
    values = published(network())
    values["layer1.0.conv1.weight"] = torch.zeros(())
    assert architecture_of("w", values) is None
    values["layer1.0.conv1.weight"] = values["layer2.0.conv1.weight"] = torch.zeros(0, 4, 3, 3)
    assert architecture_of("w", values) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.zeros(4, 1, 3, 3, dtype=torch.int8),
            r"conv1\.weight must be torch\.float32, got .*int8",
        ),
        (torch.full((4, 1, 3, 3), float("nan")), r"conv1\.weight must be finite"),
        (torch.zeros(1).expand(4, 1, 3, 3), "repeats numbers"),
        (torch.zeros(4, 1, 3, 3).to_sparse(), "must be a dense tensor"),
        (torch.zeros(4, 1, 3, 3, device="meta"), "must be a dense tensor"),
    ],
    ids=["int8", "NaN", "repeated", "sparse", "meta"],
)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, value, message):
    torch.save(published(network()) | {"conv1.weight": value}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        fitted(tmp_path / "w.pth", read_weights(tmp_path / "w.pth"), network())


def first(run) -> dict[str, torch.Tensor]:
    """Return the model in a run's first checkpoint."""
    tensors, _ = checkpoint.load(run / "checkpoints" / "step-00000000")
    return {k: v for k, v in tensors.items() if k.startswith("model.")}


def test_a_run_begins_with_a_file_of_weights(tmp_path):
    from safetensors.torch import save_file

    made = network()
    torch.save(published(made), tmp_path / "w.pth")
    save_file(dict(made.state_dict()), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        run = tmp_path / f"run of {name}"
        begun = train(CONFIG, people(), run, init=tmp_path / name, stop_after=0)
        assert begun.init == f"starts from the backbone in {tmp_path / name}; the head is new"
        values = {k.removeprefix("model.backbone."): v for k, v in first(run).items()}
        head = values.pop("model.head.weight")
        assert same(values, dict(made.state_dict()))
        train(CONFIG, people(), tmp_path / f"plain {name}", stop_after=0)
        assert torch.equal(head, first(tmp_path / f"plain {name}")["model.head.weight"])
        command = json.loads((run / "config.json").read_text())["command"]
        assert command == {"init": str(tmp_path / name)}
    with pytest.raises(CheckpointError, match="another architecture"):
        train(replace(CONFIG, depths=(1, 1)), people(), tmp_path / "b", init=tmp_path / "w.pth")
    assert not (tmp_path / "b").exists()
    with pytest.raises(FileNotFoundError, match=r"init does not exist: .*typo\.pth"):
        train(CONFIG, people(), tmp_path / "b", init=tmp_path / "typo.pth")
    with pytest.raises(ValueError, match=r"w\.pth is a file of weights without a head"):
        train(CONFIG, people(), tmp_path / "b", init=tmp_path / "w.pth", init_head="resize")


@pytest.mark.parametrize("count", [4, 8])
def test_the_head_of_an_initial_run_is_resized_kept_or_new(tmp_path, count):
    before = train(SMALL, people(6), tmp_path / "a").head.weight
    options = {"init": tmp_path / "a", "stop_after": 0}
    train(SMALL, people(count), tmp_path / "plain", stop_after=0)
    fresh = first(tmp_path / "plain")["model.head.weight"]
    resized = train(SMALL, people(count), tmp_path / "b", init_head="resize", **options)
    kept = min(6, count)
    assert f"and its first {kept} class centers, which are the first here" in resized.init
    centers = first(tmp_path / "b")["model.head.weight"]
    assert torch.equal(centers, torch.cat([before[:kept], fresh[kept:]]))
    with pytest.raises(CheckpointError, match=f"cannot be kept: that run has 6 .*data {count}"):
        train(SMALL, people(count), tmp_path / "c", init_head="keep", **options)
    new = train(SMALL, people(6), tmp_path / "d", init_head="new", **options)
    assert new.init.endswith("the head is new")
    assert not torch.equal(first(tmp_path / "d")["model.head.weight"], before)
    train(SMALL, people(6), tmp_path / "e", init_head="keep", **options)
    assert torch.equal(first(tmp_path / "e")["model.head.weight"], before)
    for wrong in ({"init_head": "other", **options}, {"init_head": "keep"}):
        with pytest.raises(ValueError, match="init_head"):
            train(SMALL, people(6), tmp_path / "f", **wrong)


class Resized:
    """Return a rank's centers after a run of two ranks began with another's, resized."""

    def __init__(self, init, output):
        self.init, self.output = init, output

    def __call__(self, rank, ranks):
        config = replace(SMALL, batch_size=16, lr=1e-30, weight_decay=0.0, freeze=1.0)
        options = {"init": self.init, "init_head": "resize", "stop_after": 0}
        return train(config, people(8), self.output, **options).head.weight.detach()


def test_ranks_resize_a_head_and_freeze_the_backbone(tmp_path):
    before = train(SMALL, people(6), tmp_path / "a")
    rows = torch.cat(on_ranks(2, Resized(tmp_path / "a", tmp_path / "b"), tmp_path / "ranks"))
    assert torch.equal(rows[:6], before.head.weight)
    assert rows.shape == (8, 16)
    tensors, _ = checkpoint.load(checkpoint.find(tmp_path / "b"))
    frozen = {k.partition("backbone.")[2]: v for k, v in tensors.items() if "model.backbone" in k}
    assert same(frozen, dict(before.backbone.state_dict()))


@pytest.mark.parametrize("options", [{}, {"precision": "float16", "clip_norm": 1.0},
                                     {"fused_update": True}], ids=str)  # fmt: skip
def test_a_frozen_backbone_does_not_change_and_then_trains(tmp_path, options):
    config = replace(SMALL, freeze=1.0, **options)  # of 2 epochs, 3 steps each
    train(config, people(), tmp_path / "run")
    runs = [checkpoint.load(p)[0] for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")]
    train(config, people(), tmp_path / "start", stop_after=0)
    begun = first(tmp_path / "start")
    middle, end = runs
    names = [name for name in begun if "backbone" in name]
    assert all(torch.equal(middle[name], begun[name]) for name in names)
    assert any(not torch.equal(end[name], begun[name]) for name in names)
    assert not torch.equal(middle["model.head.weight"], begun["model.head.weight"])
    train(config, people(), tmp_path / "cut", stop_after=1)
    resumed = train(config, people(), tmp_path / "cut", resume=True)
    assert same(state(resumed), {k.removeprefix("model."): v for k, v in end.items()
                                 if k.startswith("model.")})  # fmt: skip


def test_rates_by_parts_of_the_model(tmp_path):
    factors = "head=0.5,backbone=0,backbone.embed=1"
    config = replace(SMALL, lr_factors=factors, weight_decay=0.0, optimizer="sgd")
    trained = train(config, people(), tmp_path / "run")
    one = train(config, people(), tmp_path / "one", stop_after=0)
    begun, now = first(tmp_path / "one"), state(trained)
    parameters = {f"backbone.{k}" for k, p in trained.backbone.named_parameters()}
    changed = {k for k in parameters if not torch.equal(begun[f"model.{k}"], now[k])}
    assert changed == {k for k in parameters if k.startswith("backbone.embed.")}
    plain = train(replace(SMALL, weight_decay=0.0), people(), tmp_path / "plain", stop_after=0)
    before = first(tmp_path / "plain")["model.head.weight"]
    step, half = plain.head.weight - before, one.head.weight - before
    torch.testing.assert_close(half, step / 2, rtol=1e-4, atol=1e-7)
    assert one.history[0]["lr"] == plain.history[0]["lr"]  # the schedule's
    train(config, people(), tmp_path / "cut", stop_after=1)
    assert same(state(train(config, people(), tmp_path / "cut", resume=True)), now)


@pytest.mark.parametrize(
    "factors", ["head", "head=x", "other=1", "head=-1", "head=1,head=2", "head=nan", "headset=1"]
)
def test_factors_of_another_form_are_refused(factors):
    with pytest.raises(ValueError, match="lr_factors must be name=factor"):
        replace(SMALL, lr_factors=factors)


def test_factors_of_unknown_parts_are_refused(tmp_path):
    config = replace(SMALL, lr_factors="backbone.stages.1=0.1,backbone.stage=0.1")
    with pytest.raises(ValueError, match=r"must name parts of the model \(backbone\.embed, .*"
                                         r"head\.weight\), got backbone\.stage$"):  # fmt: skip
        train(config, people(), tmp_path / "run")


def test_short_names_of_the_published_networks():
    assert TrainConfig(backbone="r50") == TrainConfig(backbone="iresnet50")
    assert TrainConfig(backbone="r18").to_json()["backbone"] == "iresnet18"


def test_records_of_older_versions_compare_equal():
    assert not {"freeze", "lr_factors", "backbone"} & SMALL.to_json().keys()
    changed = replace(SMALL, freeze=0.5, lr_factors="head=2")
    assert TrainConfig.from_json(changed.to_json()) == changed


@pytest.mark.usefixtures("blank_figures")
def test_the_command_line_begins_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "faces")
    torch.save(published(network(channels=1)), "w.pth")
    given = ["train", "--data", "faces", "--holdout", "0", "--epochs", "1", "--size", "16x16"]
    given += ["--init", "w.pth", "--embedding-size", "16"]
    sizes = ["--widths", "4,8", "--depths", "2,1", "--freeze", "1"]
    shown = call(*given, *sizes, "--output", "run")
    assert f"the run starts from the backbone in {tmp_path / 'w.pth'}; the head is new" in shown
    call("train", "--resume", "run")
    shown = refused(*given, "--output", "other")
    assert "these weights need --widths 4,8 --depths 2,1 --embedding-size 16" in shown
    shown = refused("train", "--data", "faces", "--init-head", "keep", "--output", "other")
    assert "--init-head has no effect without --init" in shown
    assert not (tmp_path / "other").exists()


TIMM = {"mobilenetv3_small_050": (32, 32, 1), "vit_tiny_patch16_224": (48, 48, 3)}


def use_timm() -> None:
    torchvision_stand_in.install()
    for name, shape in TIMM.items():
        config = TrainConfig(backbone=f"synface.models.timm:{name}", embedding_size=16)
        network = build_backbone(config, shape).eval()
        print(tuple(network(torch.zeros(2, shape[2], *shape[:2])).shape))
    try:
        build_backbone(TrainConfig(backbone="synface.models.timm:no_such_network"), (32, 32, 1))
    except ValueError as error:
        print(error)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
@pytest.mark.slow
def test_networks_of_timm_are_backbones(tmp_path):
    code, shown = finished(tmp_path / "shown", use_timm)  # timm may find the stand-in only there
    assert code == 0, shown
    *shapes, error = shown.splitlines()
    assert shapes == ["(2, 16)"] * 2
    assert "cannot be imported: timm " in error
    assert "has no network 'no_such_network'" in error
