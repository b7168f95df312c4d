"""Backbones: their shapes, the published sizes, batches of one image, and bad arguments."""

from importlib import import_module

import pytest
import torch
from synface.models import PRESETS
from synface.models import iresnet as module
from synface.models.iresnet import IResNet


@pytest.mark.parametrize(("size", "channels"), [((56, 46), 1), ((17, 33), 3)])
def test_backbone_shapes(size, channels):
    model = IResNet(size, channels, widths=(4, 8, 8, 8), embedding_size=16)
    assert model(torch.randn(3, channels, *size)).shape == (3, 16)


@pytest.mark.parametrize("widths", [(4, 8), (4, 4, 8, 8)])  # ends in 4×4 pixels, and in one
def test_a_last_batch_of_one(widths):
    model = IResNet((16, 16), 1, widths, depths=(1,) * len(widths), embedding_size=16)
    model(torch.randn(8, 1, 16, 16))  # the running statistics are not the initial ones
    running = model.norm.running_mean.clone()
    out = model(torch.randn(1, 1, 16, 16))
    assert out.isfinite().all()
    assert out.abs().max() > 0
    assert torch.equal(model.norm.running_mean, running)
    out.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (8, 64)}, "at least 16 pixels a side for 4 stages, got 8×64"),
        ({"image_size": (64, 64), "depths": (1, 1)}, "equally many"),
        ({"image_size": (64, 64), "embedding_size": 0}, "positive"),
    ],
)
def test_backbone_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        IResNet(**arguments)


# -- the published sizes


LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
# The parameters of insightface's arcface_torch at 112×112, 512 dimensions.
PARAMETERS = {18: 24_025_600, 34: 34_139_328, 50: 43_590_848, 100: 65_156_160}


def published(layers) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of arcface_torch's state dict, from the paper's definition."""
    shapes = {}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["conv1.weight"], shapes["prelu.weight"] = (64, 3, 3, 3), (64,)
    norm("bn1", 64)
    before = 64
    for stage, (channels, blocks) in enumerate(zip((64, 128, 256, 512), layers, strict=True), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (channels, before, 3, 3)
            shapes[f"{name}.conv2.weight"] = (channels, channels, 3, 3)
            shapes[f"{name}.prelu.weight"] = (channels,)
            norm(f"{name}.bn1", before)
            norm(f"{name}.bn2", channels)
            norm(f"{name}.bn3", channels)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (channels, before, 1, 1)
                norm(f"{name}.downsample.1", channels)
            before = channels
    norm("bn2", 512)
    shapes["fc.weight"], shapes["fc.bias"] = (512, 512 * 7 * 7), (512,)
    norm("features", 512)
    return shapes


@pytest.mark.parametrize("size", LAYERS)
def test_a_preset_is_the_published_network(size):
    """Its state dict has insightface's names and shapes, so its weights load."""
    with torch.device("meta"):
        network = getattr(import_module("synface.models.iresnet"), f"iresnet{size}")()
    found = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == published(LAYERS[size])
    assert sum(each.numel() for each in network.parameters()) == PARAMETERS[size]
    fixed = [name for name, each in network.named_parameters() if not each.requires_grad]
    assert fixed == ["features.weight"]
    assert PRESETS[f"iresnet{size}"] == LAYERS[size]


def test_a_preset_embeds_images_of_other_sizes():
    network = module.iresnet18((20, 33), channels=1, embedding_size=24, dropout=0.1)
    assert network(torch.randn(2, 1, 20, 33)).shape == (2, 24)
    assert network.dropout.p == 0.1
    with pytest.raises(ValueError, match="at least 16 pixels a side for 4 stages, got 8×64"):
        module.iresnet18((8, 64))


def test_a_preset_computes_what_the_configurable_network_does():
    """Their layers are the same in another order of construction."""
    shape = {"image_size": (16, 16), "channels": 1, "embedding_size": 8}
    wanted = IResNet(**shape, widths=(64, 128, 256, 512), depths=PRESETS["iresnet18"])
    network = module.iresnet18(**shape)
    stages = [each for stage in (1, 2, 3, 4) for each in getattr(network, f"layer{stage}")]
    pairs = [(network.conv1, wanted.stem[0]), (network.bn1, wanted.stem[1])]
    pairs += [(network.prelu, wanted.stem[2]), (network.bn2, wanted.embed[0])]
    pairs += [(network.fc, wanted.embed[3]), (network.features, wanted.norm)]
    for ours, theirs in zip(stages, wanted.stages, strict=True):
        pairs += [(getattr(ours, n), t) for n, t in zip(ours.NAMES, theirs.body, strict=True)]
        if ours.downsample is not None:
            pairs.append((ours.downsample, theirs.shortcut))
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(network.eval()(images), wanted.eval()(images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [IResNet, module.iresnet18])
def test_a_pixels_channels_are_side_by_side_on_a_cpu(make, channels):
    """The layers' results have the order of channels_last, and the values of torch's own order."""
    network = make((16, 16), channels=channels, embedding_size=8).eval()
    first = next(each for each in network.modules() if isinstance(each, torch.nn.Conv2d))
    images = torch.randn(2, channels, 16, 16)
    assert first(images).is_contiguous(memory_format=torch.channels_last)
    embeddings = network(images)
    network.double()(images.double()).sum().backward()
    gradients = [each.grad for each in network.parameters() if each.grad is not None]
    assert all(grad.is_contiguous() for grad in gradients)  # as the parameters
    network.zero_grad()
    first.register_forward_hook(lambda module, inputs, output: output.contiguous())
    network(images.double()).sum().backward()
    expected = [each.grad for each in network.parameters() if each.grad is not None]
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(network.float()(images), embeddings, rtol=1e-3, atol=1e-4)


def test_backward_in_bfloat16_is_close_in_either_order():
    torch.manual_seed(0)
    network = IResNet((16, 16), 3, (16, 48, 80), (1, 1, 1), 8)
    first, images = network.stem[0], torch.randn(8, 3, 16, 16)
    assert isinstance(first, module.ChannelsLastConv2d)
    ends = torch.randn(8, 8)

    def gradients():
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = network(images)
        (embeddings.float() * ends).sum().backward()
        return [each.grad.clone() for each in network.parameters() if each.grad is not None]

    found = gradients()
    first.register_forward_hook(lambda module, inputs, output: output.contiguous())
    expected = gradients()
    largest = max(float(each.norm()) for each in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        # A shift before a normalization has no gradient but rounding's.
        assert (ours - theirs).norm() <= 0.15 * theirs.norm() + 1e-3 * largest


def test_narrow_networks_keep_torchs_order():
    """Torch 2.13's backward convolution would corrupt memory in the other order."""
    for widths in ((8, 16), (16, 24), (4,)):
        network = IResNet((16, 16), widths=widths, depths=[1] * len(widths))
        assert network.stem(torch.randn(2, 1, 16, 16)).is_contiguous()
