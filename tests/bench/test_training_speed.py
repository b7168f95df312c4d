"""synface bench training: what is measured, and its report."""

import json
import multiprocessing
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from synface.bench import loaders, loops, meter, training, training_report
from synface.bench.loops import SpeedConfig, ratios
from synface.bench.measure import arcface
from synface.bench.meter import PHASES, Meter
from synface.common.interrupts import Terminated
from synface.data import normalize, read_folder

import synface_kernels as sk
from tests.helpers.command_line import call, refused

TINY = {"backbone": "iresnet", "size": "16x16", "batch-size": "8", "identities": "200"}
TINY |= {
    "device": "cpu",
    "embedding-size": "8",
    "classes": "100,200",
    "workers": "1",
    "seconds": "0",
}
CPU = torch.device("cpu")
COMMAND = ["bench", "training"] + [part for k, v in TINY.items() for part in (f"--{k}", v)]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return loaders.write_faces(tmp_path_factory.mktemp("faces"), (16, 16), 30)


@pytest.mark.slow
def test_the_report_has_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FILES", 16)
    monkeypatch.setattr(loops, "TURN", 0.01)
    output = tmp_path / "report"
    said = call(*COMMAND, "--output", output)
    assert "images/s" in said
    result = json.loads((output / "training-speed.json").read_text())
    assert result["config"]["size"] == [16, 16]
    for name in loops.LOOPS:
        assert result["rates"][name][0] > 0
        assert set(result["seconds"][name]) == set(PHASES)
        # The phases are the whole step, and the backbone's and the head's were timed.
        assert min(result["seconds"][name][phase] for phase in ("backbone", "head")) > 0
    assert [row["classes"] for row in result["heads"]] == [100, 200]
    assert all(0 < share < 1 for row in result["heads"] for share in row["share"].values())
    assert set(result["loaders"]) == {"synface", "torch", "decoding"}
    page = (output / "training-speed.md").read_text()
    assert page.startswith("# Training speed")
    assert "--backbone iresnet --size 16x16" in page
    assert (output / "training-speed.png").stat().st_size > 0


def test_a_steps_phases_are_its_parts():
    found = meter.phases([0, 0.5, 1, 2, 2.5, 3, 4, 6, 7, 7.5, 8, 9])
    assert found == {
        "loader": 0.5, "backbone": 3.0, "head": 2.0, "optimizer": 1.0, "rest": 2.5
    }  # fmt: skip


class FakeGpu:
    """A GPU whose clock is a second further with each event, and that says when it is waited for.

    Attributes:
        waits: the number of events before each wait.
        allocated, peak: bytes.
    """

    def __init__(self, monkeypatch):
        self.events, self.waits = 0, []
        self.allocated, self.peak = 100, 150
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "the device's stream"
                gpu.events += 1
                self.time = gpu.events

            def elapsed_time(self, end):
                assert gpu.waits
                assert gpu.waits[-1] >= end.time
                return 1e3 * (end.time - self.time)

        for name, function in {
            "Event": Event,
            "current_stream": lambda device: "the device's stream",
            "synchronize": lambda device: self.waits.append(self.events),
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)


def test_a_turn_on_a_gpu_waits_at_its_ends_alone(monkeypatch):
    gpu, of_device = FakeGpu(monkeypatch), Meter(torch.device("cuda", 1))
    turn = meter.Turn(of_device)
    turn.stamps += ([of_device.stamp() for _ in range(12)] for _ in range(2))
    assert gpu.waits == [0]
    assert turn.end() == 2 * [
        {"loader": 1.0, "backbone": 2.0, "head": 3.0, "optimizer": 1.0, "rest": 4.0}
    ]
    assert gpu.waits == [0, 24]
    assert turn.seconds > 0
    assert (turn.before, turn.peak) == (100, 150)


def test_a_loops_memory_is_without_that_of_the_others(monkeypatch):
    gpu, of_device = FakeGpu(monkeypatch), Meter(torch.device("cuda"))
    config = SpeedConfig(device="cuda", rounds=1)

    class Loop:
        held = 30

        def step(self):
            return [of_device.stamp() for _ in range(12)]

    loop, source = Loop(), SimpleNamespace()
    gpu.allocated = 20  # by others
    race = loops.Race(config, of_device, source, {"torch": loop}, 3, lambda _: True, lambda: None)
    gpu.allocated = 100
    with race.hooks:
        race.start(10**9, 0)
        for taken in range(loops.WARM_UP["cuda"]):
            assert race.steps == 0
            assert race.taken == taken
            loop.warm_up = lambda: None
            race.step(0.0, 0.0, 64)
        assert (race.steps, race.untimed) == (loops.STEPS, 3)
        with suppress(loops._Ended):
            while True:
                race.recorder.stamps += loop.step()[1:]
                race.step(0.0, 0.0, 64)
    assert race.peaks == {"synface": [150 - 20 - 30], "torch": [150 - 100 + 30], "tuned": []}
    assert len(race.phases["synface"]) == len(race.phases["torch"]) == loops.STEPS


def test_ratios_are_those_of_the_rounds():
    assert ratios([2, 4, 9], [1, 1, 3]) == {"median": 3, "least": 2, "most": 4}


def test_the_plain_loader_gives_the_images_that_ours_gives(faces):
    plain = loaders.PillowDataset(faces, (16, 16))
    for index in (0, 7):
        image, label = plain[index]
        ours = torch.from_numpy(faces.store.decode(index, (16, 16), 3).copy())
        torch.testing.assert_close(image, normalize(ours[None])[0])
        assert label == faces.labels[index]
    smaller, _ = loaders.PillowDataset(faces, (8, 12))[0]
    with Image.open(faces.store.path(0)) as image:
        resized = np.array(image.resize((12, 8), Image.Resampling.BILINEAR))
    torch.testing.assert_close(smaller, normalize(torch.from_numpy(resized)[None])[0])


def test_images_that_fill_batches_come_from_the_whole_set(faces):
    whole = loaders.whole_batches(faces, 8)
    assert len(whole) == 24
    names = [whole.name(i) for i in range(24)]
    assert len(set(names)) == 24
    assert names[0] == faces.name(0)
    assert names[-1] == faces.name(28)
    with pytest.raises(ValueError, match=r"must hold a batch of 31, got 30"):
        loaders.whole_batches(faces, 31)


def test_the_loops_train_the_same_network(faces):
    config = SpeedConfig("iresnet", (16, 16), 8, 50, 8, workers=1)
    batches = loaders.plain_batches(faces, config.size, 8, 1)
    plain, tuned = (
        loops.PlainLoop(config, batches, (16, 16, 3), each, Meter(CPU)) for each in (False, True)
    )
    images = next(batches)[0]
    for loop in (plain, tuned):
        loop.backbone.eval()
    torch.testing.assert_close(plain.backbone(images), tuned.backbone(images))
    assert plain.backbone.stem(images).is_contiguous()
    assert tuned.backbone.stem(images).is_contiguous(memory_format=torch.channels_last)


def test_the_tuned_loop_of_a_gpu_has_channels_last_convolutions(faces, monkeypatch):
    config, meter = SpeedConfig("iresnet", (16, 16), 8, 50, 8, workers=1), Meter(CPU)
    monkeypatch.setattr(meter, "on_gpu", True)
    monkeypatch.setattr(meter, "allocated", lambda: 0)
    for tuned in (False, True):
        loop = loops.PlainLoop(config, iter(()), (16, 16, 3), tuned, meter)
        convolutions = [m for m in loop.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
        wide = [m.weight for m in convolutions if m.kernel_size != (1, 1)]
        assert wide
        for weight in wide:
            assert weight.is_contiguous(memory_format=torch.channels_last) == tuned


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_heads_are_timed_as_they_are_trained(faces, tmp_path, monkeypatch, precision):
    """Embeddings have the dtype, and the head the autocast, that they have in `train`."""
    monkeypatch.setattr(loops, "TURN", 0.01)
    config = SpeedConfig(
        "iresnet", (16, 16), 8, 100, 8, (100,), workers=1, rounds=1, precision=precision
    )
    real, seen = sk.margin_cross_entropy, []

    def spied(x, *given, **options):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return real(x, *given, **options)

    monkeypatch.setattr(sk, "margin_cross_entropy", spied)
    race = loops.race(
        config, loaders.whole_batches(faces, 8), tmp_path, lambda _: False, lambda: None
    )
    assert not race.failed
    trained = set(seen)
    seen.clear()
    for name in training.HEADS:
        training.head_step(name, config, faces, 100, race.dtype)()
    assert set(seen) == trained == {(getattr(torch, precision), precision == "bfloat16")}


def test_a_backbone_without_convolutions(tmp_path, monkeypatch):
    (tmp_path / "plain_nets.py").write_text(
        "from torch import nn\n"
        "def linear(image_size, channels, embedding_size):\n"
        "    pixels = channels * image_size[0] * image_size[1]\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, embedding_size))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(training, "FILES", 16)
    monkeypatch.setattr(loops, "TURN", 0.01)
    options = ("--backbone", "plain_nets:linear", "--output", tmp_path)
    assert "plain torch with fused SGD for the centers" in call(*COMMAND, *options)
    page = (tmp_path / "training-speed.md").read_text()
    assert "channels_last" not in page
    sys.modules.pop("plain_nets")


def test_loaders_have_ended_when_decoding_alone_is_timed(faces, monkeypatch):
    real, children = loaders._decoding, []

    def spied(*given):
        children.append(multiprocessing.active_children())
        return real(*given)

    before = multiprocessing.active_children()
    monkeypatch.setattr(loaders, "_decoding", spied)
    rounds = iter([True, False])
    found = loaders.loading(faces, (16, 16), 8, 1, lambda: next(rounds), count=8)
    assert children == [before]
    assert {name: len(each) for name, each in found.items()} == {
        "synface": 2, "torch": 2, "decoding": 2
    }  # fmt: skip


def out_of_memory(*_, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")


def test_what_fails_loses_nothing_else(tmp_path, monkeypatch, blank_figures):
    monkeypatch.setattr(training, "FILES", 16)
    monkeypatch.setattr(loops, "TURN", 0.01)
    for module, name in ((loops, "arcface"), (training, "arcface"), (training, "loading")):
        monkeypatch.setattr(module, name, out_of_memory)
    said = call(*COMMAND, "--memory", "1", "--output", tmp_path)
    reason = "not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert f"plain torch: {reason}" in said
    result = json.loads((tmp_path / "training-speed.json").read_text())
    assert result["rates"]["torch"] == result["rates"]["tuned"] == result["loaders"] == reason
    assert result["rates"]["synface"][0] > 0
    assert set(result["seconds"]) == {"synface"}
    assert result["ratios"] == result["loader_ratios"] == {}
    assert result["resident"]
    for row in result["heads"]:
        assert row["seconds"]["torch"] == reason
        assert set(row["times"]) == set(row["share"]) == {"synface", "fused update"}
    page = (tmp_path / "training-speed.md").read_text()
    assert page.count("CUDA out of memory") == 5
    assert "decoded in memory" in page
    assert "What limits `synface train`: not measured" in page


def test_a_run_that_ends_early_leaves_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FILES", 16)
    monkeypatch.setattr(loops, "TURN", 0.01)

    def ended(*_, **options):
        raise Terminated

    monkeypatch.setattr(training, "loading", ended)
    call(*COMMAND, "--memory", "1", "--output", tmp_path, code=143)
    result = json.loads((tmp_path / "training-speed.json").read_text())
    assert set(result["rates"]) == set(loops.LOOPS)
    assert result["environment"]["torch"] == torch.__version__
    assert result["command"].startswith("synface bench training --backbone iresnet")
    assert "loaders" not in result


def test_a_run_that_ends_among_the_loops_leaves_their_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FILES", 16)
    monkeypatch.setattr(loops, "TURN", 0.01)
    real, turns = loops.Race._add, []

    def ended(*given):
        real(*given)
        turns.append(given)
        if len(turns) == 4:
            raise Terminated

    monkeypatch.setattr(loops.Race, "_add", ended)
    options = ("--memory", "1", "--seconds", "60", "--output", tmp_path)
    call(*COMMAND, *options, code=143)
    result = json.loads((tmp_path / "training-speed.json").read_text())
    assert {name: len(each) for name, each in result["rates"].items()} == dict.fromkeys(
        loops.LOOPS, 1
    )


def test_plain_torch_under_the_autocast_of_a_gpu(monkeypatch):
    """There acos is an operation of float32."""
    acos = torch.Tensor.acos
    monkeypatch.setattr(torch.Tensor, "acos", lambda self: acos(self.float()))
    x, w = torch.randn(4, 8).requires_grad_(), torch.randn(6, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = arcface(x, w, torch.arange(4))
    loss.backward()
    expected = arcface(x.detach(), w.detach(), torch.arange(4))
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0)


def test_without_synface_train_the_command_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FILES", 16)
    monkeypatch.setattr(loops, "TURN", 0.01)
    monkeypatch.setattr(loops, "train", out_of_memory)
    said = call(*COMMAND, "--memory", "1", "--output", tmp_path, code=1)
    assert "`synface train`: not measured: OutOfMemoryError" in said
    result = json.loads((tmp_path / "training-speed.json").read_text())
    assert [set(row["times"]) for row in result["heads"]] == 2 * [set(training.HEADS)]
    assert "What limits `synface train`: not measured" in said
    assert "not measured" in (tmp_path / "training-speed.md").read_text()
    assert (tmp_path / "training-speed.png").stat().st_size > 0  # though a panel has no data


def test_the_report_of_a_gpu():
    committed = Path(__file__).parents[2] / "docs/results/training-speed.json"
    result = json.loads(committed.read_text())
    on_cpu = training_report._page(result, "command")
    assert "it has the settings of torch" in on_cpu
    assert "The rest of a step limits `synface train`" in on_cpu
    result["config"] |= {"device": "cuda:1"}
    result["memory"] = {"synface": 3 << 30, "tuned": 5 << 29}
    result["float32"] = {"matmul_precision": "highest", "convolutions_tf32": True}
    result["seconds"]["synface"] = dict.fromkeys(PHASES, 0.001)
    page = training_report._page(result, "command")
    assert "but for the loop with channels_last and fused SGD" in page
    assert "convolutions of float32 may use TF32" in page
    assert "peak memory, GiB" in page
    assert "| 3.00 |" in page
    assert "| 2.50 |" in page
    assert "The loader limits `synface train`: the loader alone gives 3760 images/s" in page


def test_images_in_memory_give_shuffled_batches(faces):
    held = read_folder(faces, (16, 16), False)
    batches = loaders.plain_batches(held, (16, 16), 10, 1)
    passes = [[next(batches) for _ in range(3)] for _ in range(2)]
    for each in passes:
        images, labels = (torch.cat(part) for part in zip(*each, strict=True))
        assert sorted(labels.tolist()) == sorted(held.labels.tolist())
        torch.testing.assert_close(images.sum(), normalize(held.images).sum())
    assert images.shape == (30, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "1"], "classes must be numbers of 2 or more"),
        (["--classes", "many"], "--classes must be a count"),
        (["--precision", "float16"], "precision must be float32 or bfloat16"),
        (["--size", "wide"], "--size must be HEIGHTxWIDTH"),
        (["--identities", "20"], "identities must be at least the 100"),
        (["--backbone", "resnet"], "backbone must be one of"),
        (["--device", "cuda:99"], "device must be one that torch has here"),
        (["--device", "meta"], "device must be one that torch has here"),
        (["--memory", "-1"], "--memory"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    assert message in refused(*COMMAND, *options, "--output", tmp_path)


def test_a_folder_of_ones_own(faces, tmp_path):
    said = refused(*COMMAND, "--batch-size", "64", "--data", faces.source, "--output", tmp_path)
    assert f"{faces.source} must hold a batch of 64, got 30" in said


def test_a_summary_names_the_shares():
    shares = training_report._shares({"loader": 1.0, "backbone": 3.0})
    assert shares == {"loader": 0.25, "backbone": 0.75}


def test_a_device_is_a_cpu_or_a_gpu():
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got 'mps'"):
        SpeedConfig(device="mps")
