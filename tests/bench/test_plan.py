"""The plan of a training run: its memory model against measured peaks, its sums and remedies."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from synface.bench.plan import (
    DEPTHS,
    DEVICES,
    WORKSPACE,
    Settings,
    exchange,
    memory,
    parse_bytes,
    parse_count,
    plan,
    read_measured,
)
from synface.models.iresnet import IResNet
from torch import Tensor

import synface_kernels as sk
from benchmarks.machine import describe
from synface_kernels.testing import peak_bytes
from tests.helpers.command_line import call
from tests.helpers.forked import numbers_of


def print_peak_of_training(
    classes: int, dim: int, batch: int, centers: str, optimizer: str, rate: float, fused: bool
) -> None:
    def train(classes: int, steps: int) -> Tensor:
        weight = torch.randn(classes, dim, dtype=getattr(torch, centers)).requires_grad_(not fused)
        state = {"sgd": 1, "adamw": 2, "none": 0}[optimizer]
        states = [torch.zeros_like(weight) for _ in range(state)]
        last = torch.zeros(classes, dtype=torch.int32) if rate < 1 else None
        for step in range(1, steps + 1):
            x = torch.randn(batch, dim).to(torch.bfloat16).requires_grad_()
            target, ids = torch.randint(0, classes, (batch,)), None
            if rate < 1:
                ids, target = sk.sample_classes(target, classes, int(rate * classes))
            if fused:
                update = sk.SGDUpdate(
                    lr=0.1, momentum=0.9, momentum_buffer=states[0], step=step, last_step=last
                )
                sk.margin_cross_entropy(x, weight, target, class_ids=ids, update=update).backward()
                continue
            sk.margin_cross_entropy(x, weight, target, class_ids=ids).backward()
            gradient, weight.grad = weight.grad, None
            if rate < 1:
                gradient = gradient.coalesce().values()
            else:
                ids = torch.arange(classes)
            kwargs = {"lr": 0.1, "step": step, "last_step": last}
            with torch.no_grad():
                if optimizer == "adamw":
                    moments = {"exp_avg": states[0], "exp_avg_sq": states[1]}
                    sk.row_adamw_(weight, gradient, ids, **moments, **kwargs)
                else:
                    momentum = {"momentum_buffer": states[0], "momentum": 0.9} if states else {}
                    sk.row_sgd_(weight, gradient, ids, **momentum, **kwargs)
            del gradient  # as zero_grad() does
        return weight

    train(1000, 2)
    print(peak_bytes(lambda: train(classes, 2)))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("centers", "optimizer", "sample_rate", "fused"),
    [
        ("float32", "sgd", 1.0, False),
        ("float32", "sgd", 1.0, True),
        ("bfloat16", "sgd", 1.0, False),
        ("float32", "none", 1.0, False),
        ("float32", "adamw", 1.0, False),
        ("float32", "sgd", 0.1, False),
        ("bfloat16", "adamw", 0.05, False),
    ],
)
@pytest.mark.slow
def test_the_memory_model_is_what_is_measured(centers, optimizer, sample_rate, fused, tmp_path):
    settings = Settings(
        1_000_000,
        128,
        batch=64,  # the time grows with it, and the memory hardly
        sample_rate=sample_rate,
        fused_update=fused,
        centers=centers,
        optimizer=optimizer,
        backbone=None,
    )
    s = settings
    arguments = [s.identities, s.dim, s.batch, centers, optimizer, sample_rate, fused]
    (measured,) = numbers_of(tmp_path / "shown", print_peak_of_training, *arguments)
    model = sum(memory(settings).values())
    # the model's workspace is an upper bound
    assert model - WORKSPACE <= 1.02 * measured, (measured, model)
    assert measured <= 1.02 * model, (measured, model)


@pytest.mark.slow
def test_parts_add_up():
    settings = Settings(10_000_001, 64, gpus=4, batch=64, sample_rate=0.5, labels=3)
    parts = memory(settings)
    assert settings.classes == 2_500_001
    assert settings.sampled == 1_250_001
    assert parts["centers"] == 2_500_001 * 64 * 4
    assert parts["centers' gradient"] == 1_250_001 * 64 * 4
    found = plan(settings)
    assert found.total == sum(parts.values())
    assert found.fits
    assert not found.remedies
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.time.values()))


@pytest.mark.slow
def test_a_fused_update_has_no_gradient():
    settings = Settings(1_000_000, gpus=2, optimizer="adamw")
    apart, fused = plan(settings), plan(replace(settings, fused_update=True))
    gradient = apart.memory["centers' gradient"]
    assert "centers' gradient" not in fused.memory
    assert fused.total == apart.total - gradient
    rate = DEVICES[settings.device].bandwidth  # it is neither written nor read
    assert apart.time["centers' update"].seconds - fused.time["centers' update"].seconds == (
        pytest.approx(gradient / rate)
    )


def test_alone_nothing_is_exchanged():
    assert sum(exchange(Settings(1000, gpus=1)).values()) == 0
    assert "exchange" not in plan(Settings(1000)).time


def test_every_positive_is_sampled():
    assert Settings(1_000_000, sample_rate=0.0001, batch=512, labels=3).sampled == 1536
    assert Settings(1000, sample_rate=0.5, batch=4096).sampled == 1000


@pytest.mark.parametrize("name", DEPTHS)
def test_backbone_is_counted_as_built(name):
    with torch.device("meta"):
        network = IResNet((112, 112), 3, (64, 128, 256, 512), DEPTHS[name], 512)
    parameters = sum(p.numel() for p in network.parameters())
    assert memory(Settings(1000, backbone=name))["backbone"] == 12 * parameters


def test_activations_are_what_autograd_keeps():
    """The estimate is compared with the storages that autograd saves for a backward pass."""
    from synface.bench import plan as module

    network = IResNet((112, 112), 3, (64, 128, 256, 512), DEPTHS["r18"], 512)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(2, 3, 112, 112)).sum()
    _, per_image, _ = module._backbone("r18", 512)
    assert sum(s.nbytes() for s in saved.values()) == pytest.approx(2 * per_image, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(100_000_000, gpus=8),
        Settings(100_000_000, gpus=8, optimizer="adamw"),
        Settings(50_000_000, centers="bfloat16"),
        Settings(1_000_000_000, gpus=2, sample_rate=0.1),
    ],
)
def test_remedies_do_what_they_say(settings):
    found = plan(settings)
    assert not found.fits
    assert found.remedies
    assert any(remedy.fits for remedy in found.remedies)
    for remedy in found.remedies:
        assert remedy.bytes < found.total
        assert remedy.fits == (remedy.bytes <= found.available)
        option, *values = remedy.change.split("--")[1].split()
        name = option.replace("-", "_")
        kind = type(getattr(settings, name))
        changed = plan(replace(settings, **{name: kind(*values) if values else True}))
        assert changed.fits == remedy.fits, remedy
        assert changed.total == pytest.approx(remedy.bytes, rel=0.01)


def test_measured_rates_replace_the_data_sheet(tmp_path):
    file = tmp_path / "device.json"
    ceilings = {"copy_gigabyte_per_second": 3350 / 2, "product_tflop_per_second": 989 / 2}
    properties = SimpleNamespace(
        name="H100", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0
    )
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        described = describe(torch.device("cuda", 0))
    file.write_text(json.dumps({"machine": described, "ceilings": ceilings}))
    settings = Settings(10_000_000)
    sheet, measured = plan(settings), plan(settings, read_measured(file))
    assert measured.seconds == pytest.approx(2 * sheet.seconds)
    assert all(part.measured for part in measured.time.values())
    assert not any(part.measured for part in sheet.time.values())
    assert "not measured" in sheet.rates
    assert "measured on H100" in measured.rates


HUGE = json.dumps({"ceilings": {"copy_gigabyte_per_second": 10**400}})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ceilings": {}}', "\xff", HUGE])
def test_what_is_no_result_is_refused(tmp_path, text):
    file = tmp_path / "device.json"
    file.write_text(text, "latin-1")
    what = "not UTF-8 text" if text == "\xff" else "not a result of make gpu-evidence"
    with pytest.raises(ValueError, match=rf"device\.json is {what}"):
        read_measured(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": 0}, "identities"),
        ({"identities": 10**30}, "identities must be at most 9223372036854775807, got 10{30}"),
        ({"batch": 10**20}, "batch must be at most"),
        ({"dim": 10**23}, "dim must be at most 1048576, got 10{23}"),
        ({"sample_rate": 0.0}, r"sample_rate must be in \(0, 1\], got 0"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"gpus": 2000}, "batch must hold an image for each of 2000 gpus, got 1024"),
        ({"centers": "int8"}, "centers must be one of float32, bfloat16, got 'int8'"),
        ({"backbone": "r9"}, "backbone must be one of None, r18"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"identities": 1000, **change})


def test_the_largest_settings_have_a_plan():
    most = 2**63 - 1
    found = plan(Settings(most, 2**20, gpus=2, batch=most, labels=most, backbone=None))
    assert not found.fits
    assert math.isfinite(found.seconds)


def test_counts_and_sizes():
    assert parse_count("identities", "10M") == 10_000_000
    assert parse_count("identities", "1.5b") == 1_500_000_000
    assert parse_count("identities", "250_000") == 250_000
    assert parse_bytes("memory", "80GB") == DEVICES["h100"].memory
    assert parse_bytes("memory", "24GiB") == 24 * 2**30
    for text in ("", "M", "1.5", "10X", "nan", "1e400", "-1", "0"):
        with pytest.raises(ValueError, match="identities must be a count"):
            parse_count("identities", text)


def test_command_line():
    command = "plan --identities 100M --dim 512 --gpus 8 --gpu-memory 80GB --batch 1024"
    shown = call(*command.split())
    assert "It does not fit" in shown
    assert "--centers bfloat16" in shown
    assert "not measured" in shown
