"""Evaluation on a GPU, which a stand-in takes the place of."""

import json

import pytest
import torch
from synface.cli import verification
from synface.common import check
from synface.evaluation import embed, verify
from torch import nn

from tests.helpers.command_line import call
from tests.helpers.stand_in_gpu import cpu, stand_in_gpu


def test_cosines_are_computed_where_the_embeddings_are(monkeypatch):
    embeddings = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) // 5
    expected = verify(embeddings, labels)
    with stand_in_gpu():
        here = embeddings.to("cuda")
        monkeypatch.setattr(torch.Tensor, "cpu", refuse_matrices(torch.Tensor.cpu))
        found = verify(here, labels)
    assert found.to_json() == expected.to_json()


def refuse_matrices(copy):
    """Return Tensor.cpu for the pairs' cosines alone."""

    def checked(tensor):
        assert tensor.dim() == 1
        return copy(tensor)

    return checked


def test_embed_returns_rows_where_they_are_wanted():
    images = torch.randint(0, 256, (5, 4, 4, 1), dtype=torch.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    expected = embed(network, images)
    with stand_in_gpu():
        network.to("cuda")
        assert embed(network, images).device.type == "cpu"
        found = embed(network, images, device="cuda")
        assert found.device.type == "cuda"
    assert torch.equal(cpu(found), expected)


@pytest.mark.usefixtures("blank_figures")
def test_eval_computes_on_its_device(tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = ["--epochs", 1, "--size", "16x16", "--embedding-size", 8, "--holdout", 5]
    call("train", "--output", run, "--widths", "4,8", "--depths", "1,1", *options)
    call("eval", run, "--output", tmp_path / "cpu")
    monkeypatch.setattr(check, "check_device", torch.device)
    came = []
    monkeypatch.setattr(
        verification, "verify", lambda *args: came.append(args[0].device.type) or verify(*args)
    )
    with stand_in_gpu():
        call("eval", run, "--device", "cuda", "--output", tmp_path / "gpu")
    # Raw pixels, the network, and raw pixels without the mean image, which is printed.
    assert came == ["cpu", "cuda", "cpu"]
    found, expected = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("gpu", "cpu")
    )
    assert [each["about"]["device"] for each in (found, expected)] == ["cuda:0", "cpu"]
    for one, other in zip(found["sets"], expected["sets"], strict=True):
        assert one["verification"] == other["verification"]
