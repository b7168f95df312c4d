"""Controls of face generators: columns of a style or of λ, and what varies or is held."""

from types import SimpleNamespace

import pytest
import torch
from synface.synthesis import (
    EigenfaceGenerator,
    HeadGenerator,
    OnnxGenerator,
    TorchScriptGenerator,
    Vary,
    open_generator,
)
from synface.synthesis.controls import (
    check_columns,
    controls_of,
    count_columns,
    neutral_of,
    parse_columns,
)
from synface.synthesis.preview import preview, random_identities

from tests.helpers.command_line import call, refused
from tests.helpers.generators import Noisy, arguments, scripted, unit

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
DISCO = "identity=0:6, expression=6:9, light=9:11, pose=11:14, noise=14:16"


class Latent(torch.nn.Module):
    """Shows λ itself: (B, 16) to (B, 1, 4, 4), a tenth of it, clamped."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent * 0.1).clamp(-1.0, 1.0).view(-1, 1, 4, 4)


class SeededLatent(torch.nn.Module):
    columns: str

    def __init__(self, columns: str):
        super().__init__()
        self.columns = columns

    def forward(self, latent: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return (latent * 0.1 + 0.0 * seed[:, None]).clamp(-1.0, 1.0).view(-1, 1, 4, 4)


def shown(images):
    """Return λ (B, 16) from images of `Latent`."""
    return (images.flatten(1).float() / 127.5 - 1.0) * 10.0


def test_a_model_of_one_input_gets_its_columns(tmp_path):
    generator = open_generator(scripted(Latent(), tmp_path / "g.pt"), columns=DISCO)
    assert (generator.embedding_size, generator.style_size) == (6, 10)
    assert generator.controls == {
        "expression": (0, 1, 2), "light": (3, 4), "pose": (5, 6, 7), "noise": (8, 9)
    }  # fmt: skip
    embedding, style, seed = arguments(5, 6, 10)
    found = shown(generator.generate(embedding, style, seed))
    want = torch.cat([embedding * 6**0.5, style], 1)
    torch.testing.assert_close(found, want.clamp(-10, 10), atol=0.05, rtol=0)


def test_identity_may_stand_anywhere_and_a_file_may_state_its_columns(tmp_path):
    columns = "pose=0:2,identity=2:10,light=10:16"
    generator = TorchScriptGenerator(scripted(SeededLatent(columns), tmp_path / "g.pt"))
    assert (generator.embedding_size, generator.style_size) == (8, 8)
    assert generator.controls == {"pose": (0, 1), "light": (2, 3, 4, 5, 6, 7)}
    embedding, style, seed = arguments(5, 8, 8)
    found = shown(generator.generate(embedding, style, seed))
    want = torch.cat([style[:, :2], embedding * 8**0.5, style[:, 2:]], 1)
    torch.testing.assert_close(found, want, atol=0.05, rtol=0)
    assert generator.description["columns"]["identity"] == [2, 10]


def test_identity_mixup_changes_the_identity_columns_alone(tmp_path):
    generator = open_generator(scripted(Latent(), tmp_path / "g.pt"), columns=DISCO)
    style, seed = torch.randn(2, 10), torch.arange(2)
    one = shown(generator.generate(unit(2, 6), style, seed))
    other = shown(generator.generate(unit(2, 6, seed=1), style, seed))
    assert (one - other)[:, 6:].abs().max() == 0
    assert (one - other)[:, :6].abs().min() > 0


def latent_onnx(path, columns=None, size=16):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    shape = numpy_helper.from_array(np.array([-1, 1, 4, 4], np.int64), "shape")
    tenth = numpy_helper.from_array(np.array(0.1, np.float32), "tenth")
    nodes = [
        helper.make_node("Mul", ["latent", "tenth"], ["m"]),
        helper.make_node("Reshape", ["m", "shape"], ["image"]),
    ]
    graph = helper.make_graph(
        nodes, "generator",
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["B", size])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, None)],
        [shape, tenth],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if columns:
        helper.set_model_props(model, {"columns": columns})
    onnx.save(model, str(path))
    return path


def test_an_onnx_file_of_one_input(tmp_path):
    stated = OnnxGenerator(latent_onnx(tmp_path / "stated.onnx", DISCO))
    given = open_generator(latent_onnx(tmp_path / "given.onnx"), 6, columns=parse_columns(DISCO))
    embedding, style, seed = arguments(5, 6, 10)
    for generator in (stated, given):
        assert (generator.embedding_size, generator.style_size) == (6, 10)
        found = shown(generator.generate(embedding, style, seed))
        want = torch.cat([embedding * 6**0.5, style], 1)
        torch.testing.assert_close(found, want.clamp(-10, 10), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match=r"columns name 9 numbers, λ has 16"):
        open_generator(tmp_path / "given.onnx", columns="identity=0:6,pose=6:9")
    with pytest.raises(ValueError, match=r"inputs must be embedding \(B, D\), style \(B, S\)"):
        open_generator(tmp_path / "given.onnx", 6)


class TwoInputs(torch.nn.Module):
    def forward(self, embedding: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        return torch.cat([embedding, style], 1).clamp(-1.0, 1.0).view(-1, 1, 4, 4)


def test_columns_name_the_style_of_a_model_of_two_inputs(tmp_path):
    path = scripted(TwoInputs(), tmp_path / "g.pt")
    generator = TorchScriptGenerator(path, 6, 10, columns={"pose": (0, 3), "rest": (3, 10)})
    assert generator.controls == {"pose": (0, 1, 2), "rest": tuple(range(3, 10))}
    with pytest.raises(ValueError, match=r"columns name 3 numbers of the style, which has 10"):
        TorchScriptGenerator(path, 6, 10, columns="pose=0:3")
    with pytest.raises(ValueError, match=r"forward must take \(λ\) or \(λ, seed\), it takes 3"):
        TorchScriptGenerator(scripted(Noisy(), path), columns="identity=0:6,pose=6:16")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("identity=0:6,pose=4:16", "columns of identity and pose overlap at 4"),
        ("identity=0:6,pose=6:9,light=8:16", "columns of pose and light overlap at 8"),
        ("identity=0:6,pose=8:16", "columns 6:8 belong to no control: name them"),
        ("identity=0:6,pose=6:6,light=6:16", r"columns of pose must be FIRST:END .* got 6:6"),
        ("identity=0-6", r"columns must read NAME=FIRST:END, .* got 'identity=0-6'"),
        ("identity=0:6,identity=6:16", "columns name 'identity' twice"),
        ("", "columns must read NAME=FIRST:END"),
        ("identity=0:16", "columns must name others than identity's"),
        ("identity=0:6,pose=6:9999999", "columns must end at 1,000,000 at most"),
        ({"identity": 6}, r"columns of identity must be \(first, end\), got 6"),
        ({"identity": (0, 6, 7)}, r"columns of identity must be \(first, end\)"),
        ({"identity": (0.0, 6.0)}, r"columns of identity must be an integer .*0\.0"),
        ({"identity": (-3, 6)}, "columns of identity must be at least 0, got -3"),
        ({"": (0, 16)}, "columns must have names that are not empty, got ''"),
        (3, r"columns must map names to \(first, end\), got 3"),
    ],
)
def test_columns_that_are_wrong(tmp_path, columns, message):
    path = scripted(Latent(), tmp_path / "g.pt")
    with pytest.raises(ValueError, match=rf"g\.pt: {message}"):
        open_generator(path, columns=columns)


def test_sizes_that_disagree_with_the_columns(tmp_path):
    path = scripted(Latent(), tmp_path / "g.pt")
    with pytest.raises(ValueError, match=r"embedding_size of .*g\.pt is 6, got 7"):
        open_generator(path, 7, columns=DISCO)
    with pytest.raises(ValueError, match=r"style_size of .*g\.pt is 10, got 3"):
        open_generator(path, 6, style_size=3, columns=DISCO)
    assert count_columns(check_columns(parse_columns(DISCO))) == 16


def test_varying_some_controls_holds_the_others():
    heads = HeadGenerator(8, 16)
    embedding, style, seed = arguments(6, 8, heads.style_size)
    images = Vary(heads, {"pose": 0.5}).generate(embedding, style, seed)
    alone = torch.zeros_like(style)
    columns = list(heads.controls["pose"])
    alone[:, columns] = 0.5 * style[:, columns]
    assert torch.equal(images, heads.generate(embedding, alone, seed))
    nothing = Vary(heads, ()).generate(embedding, style, seed)
    assert torch.equal(nothing, heads.generate(embedding, torch.zeros_like(style), seed))
    everything = Vary(heads, tuple(heads.controls)).generate(embedding, style, seed)
    assert torch.equal(everything, heads.generate(embedding, style, seed))
    assert Vary(heads, {"pose": 0.5}).description != Vary(heads, ("pose",)).description
    twice = Vary(Vary(heads, ("pose", "light")), ("light",))
    assert torch.equal(
        twice.generate(embedding, style, seed),
        Vary(heads, ("light",)).generate(embedding, style, seed),
    )


def test_strengths_scale_the_distance_from_neutral():
    faces = EigenfaceGenerator(8, 16)
    embedding, style, seed = arguments(6, 8, 10)
    nothing = Vary(faces, {"sensor": 0.0}).generate(embedding, style, seed)
    assert torch.equal(nothing, Vary(faces, ()).generate(embedding, style, seed))
    one, half = (Vary(HeadGenerator(8, 16), {"pose": x}) for x in (1.0, 0.5))
    assert Vary(half, ("pose",)).description != Vary(one, ("pose",)).description
    with pytest.raises(ValueError, match=r"style must be float32 of shape \(6, 21\)"):
        one.generate(embedding, style[:, :1], seed)
    assert one.controls == {"pose": (6, 7, 8)}


def test_arguments_that_are_not_finite():
    heads = HeadGenerator(8, 16)
    for change, name in ((0, "embedding"), (1, "style")):
        inputs = arguments(6, 8, heads.style_size)
        inputs[change][4, 1] = float("nan")
        with pytest.raises(ValueError, match=f"{name} must be finite, got nan or inf in row 4"):
            heads.generate(*inputs)


def test_eigenfaces_have_three_controls():
    faces = EigenfaceGenerator(8, 16)
    assert sorted(column for each in controls_of(faces).values() for column in each) == list(
        range(10)
    )
    embedding, style, seed = arguments(6, 8, 10)
    still = Vary(faces, ()).generate(embedding, style, seed)
    assert torch.equal(still, faces.generate(embedding, neutral_of(faces).expand(6, -1), seed))


def test_a_control_that_a_generator_lacks():
    heads = HeadGenerator(8, 16)
    with pytest.raises(ValueError, match="heads has no control 'gaze'; it has expression, pose, "):
        Vary(heads, ("pose", "gaze"))
    with pytest.raises(ValueError, match=r"strength of pose must be .*-1"):
        Vary(heads, {"pose": -1.0})

    with pytest.raises(ValueError, match="controls must be a sequence of names or a mapping"):
        Vary(heads, "pose")
    bare = SimpleNamespace(style_size=3, description={"kind": "bare"})
    assert controls_of(bare) == {}
    with pytest.raises(ValueError, match=r"bare has no control 'pose'; it has none: say which"):
        Vary(bare, ("pose",))


def test_a_preview_has_a_row_for_each_number(tmp_path, monkeypatch):
    drawn = {}

    def grid(rows, names, title, path, columns):
        drawn.update(rows=rows, names=names, columns=columns)

    monkeypatch.setattr("synface.synthesis.preview.image_grid", grid)
    heads = HeadGenerator(8, 16)
    preview(heads, random_identities(0, 8), tmp_path / "x.png")
    assert drawn["names"][3] == "expression: smile"
    assert len(drawn["names"]) == 3 + 21
    assert all(row.shape == (9, 16, 16, 1) for row in drawn["rows"])
    assert drawn["columns"][0] == "-2.3"
    wide = scripted(Latent(), tmp_path / "g.pt")
    generator = open_generator(wide, columns="identity=0:6,expression=6:15,pose=15:16")
    preview(generator, unit(2, 6), tmp_path / "x.png")
    assert drawn["names"] == [
        "identity", "all controls, 1", "all controls, 2", "expression: direction 1",
        "expression: direction 2", "expression: direction 3", "pose: 1",
    ]  # fmt: skip
    assert len({row.tobytes() for row in drawn["rows"]}) == 7


@pytest.mark.slow
def test_the_command_draws_a_preview(tmp_path):
    picture = tmp_path / "preview.png"
    shown = call("synthesize", "--preview", picture, "--size", "16x16", "--color")
    assert f"what each control does: {picture}" in " ".join(shown.split())
    assert picture.stat().st_size > 10_000
    scripted(Latent(), tmp_path / "g.pt")
    torch.save({}, tmp_path / "no.pt")
    options = ["--generator", tmp_path / "g.pt", "--preview", picture]
    call("synthesize", *options, "--columns", DISCO)
    assert "takes 1 arguments; of a model with one input say which columns" in " ".join(
        refused("synthesize", *options).split()
    )
    for file in (tmp_path / "x.jpg", tmp_path / "missing" / "x.png"):
        message = refused("synthesize", "--preview", file)
        assert "preview must be a .png file in a folder that exists" in " ".join(message.split())
    alone = refused("synthesize", "--preview", picture, "--batch-size", 2)
    assert "--batch-size has no effect without --output" in " ".join(alone.split())
    assert "overlap at 4" in refused("synthesize", *options, "--columns", "identity=0:6,pose=4:16")
    assert "--output FOLDER, --preview FILE.png, or both" in " ".join(refused("synthesize").split())
    assert "--packed FILE" in refused("synthesize", "--output", tmp_path / "faces")
