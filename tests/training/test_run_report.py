"""A run's folder holds all that its terminal showed: lines, verifications, a report."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from synface.cli.terminal import LoggedConsole
from synface.cli.verification import Verifier
from synface.data import embedded_faces

from tests.helpers.command_line import call, refused
from tests.helpers.training import TINY, folder

GIVEN = ["--holdout", "2", *TINY[2:], "--widths", "4,8", "--depths", "1,1", "--augment", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a finished run's folder, and what it printed."""
    path = tmp_path_factory.mktemp("trained")
    folder(path / "faces", people=6, images=6)
    options = ["--epochs", "3", "--verify-every", "1", "--best", "auc", "--output", path / "run"]
    return path / "run", call("train", "--data", path / "faces", *GIVEN, *options)


def lines(text: str) -> list[str]:
    """Return the lines of a text that are not empty."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_log_has_every_line_of_the_terminal(trained, tmp_path):
    run, shown = trained
    log = lines((run / "log.txt").read_text())
    assert log == lines(shown)
    epochs = [line for line in log if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in epochs] == [f"epoch {i} of 3" for i in (1, 2, 3)]
    for line in epochs:
        assert re.fullmatch(r"epoch \d of 3: loss \d+\.\d{4}, top-1 \d+\.\d%, \d+ images/s", line)
    assert len([line for line in log if line.startswith("verified: ROC-AUC")]) == 3
    copy = shutil.copytree(run, tmp_path / "run")
    call("train", "--resume", copy)
    again = lines((copy / "log.txt").read_text())
    assert again[: len(log)] == log
    assert f"report: {copy / 'report' / 'index.html'}" in again[len(log) :]


def test_the_report_has_the_figures_and_pictures(trained):
    run, shown = trained
    found = json.loads((run / "report" / "results.json").read_text())
    network, pixels = found["sets"]
    rows = [json.loads(line) for line in (run / "verification.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert network["verification"]["auc"] == rows[-1]["auc"]
    assert network["verification"]["threshold"] == rows[-1]["threshold"]
    assert rows[-1].keys() >= {"auc", "accuracy", "threshold", "tar_at_far_0.1"}
    hardest = network["scores"]["hardest_impostor"]
    assert [pair["score"] for pair in hardest] == sorted(
        (pair["score"] for pair in hardest), reverse=True
    )
    area = 2 / 100 * sum(network["scores"]["densities"]["genuine"])
    assert area == pytest.approx(1)
    assert pixels["name"] == "raw pixels"
    page = (run / "report" / "index.html").read_text()
    for name in ("training", "roc", "det", "scores", "hardest"):
        assert f'src="{name}.png"' in page
        with Image.open(run / "report" / f"{name}.png") as image:
            assert min(image.size) > 100
    assert f"ROC-AUC: trained {network['verification']['auc']:.4f}" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_best_checkpoint_is_evaluated_like_a_run(trained):
    run, _ = trained
    rows = [json.loads(line) for line in (run / "verification.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["auc"])
    shown = call("eval", run / "best", "--output", run.parent / "best report")
    assert f"ROC-AUC: trained {best['auc']:.4f}" in shown
    about = json.loads((run.parent / "best report" / "results.json").read_text())["about"]
    assert about["step"] == best["step"]


def test_a_network_below_raw_pixels_is_a_warning(trained):
    """People whose images differ by little noise: pixels tell them apart, three epochs do not."""
    run, shown = trained
    results = json.loads((run / "report" / "results.json").read_text())
    network, pixels = (each["verification"]["auc"] for each in results["sets"])
    assert network < pixels
    assert "warning: the network verifies these people worse than raw pixels do" in shown
    assert "worse than raw pixels" in results["about"]["warning"]
    verifier = Verifier(embedded_faces(4, 16, identities=6))
    assert verifier.warning(verifier.pixels) is None  # as good as these


@pytest.mark.usefixtures("blank_figures")
def test_verification_options_are_kept_and_may_change(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    command = json.loads((tmp_path / "run" / "config.json").read_text())["command"]
    assert (command["verify_every"], command["best"], command["patience"]) == (1.0, "auc", 0)
    call("train", "--resume", tmp_path / "run", "--epochs", 5, "--patience", 9)
    rows = (tmp_path / "run" / "verification.jsonl").read_text().splitlines()
    assert len(rows) == 5
    command = json.loads((tmp_path / "run" / "config.json").read_text())["command"]
    assert (command["verify_every"], command["patience"]) == (1.0, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--patience", "2"], "--patience 2 needs --best and --verify-every"),
        (["--patience", "2", "--best", "auc"], "needs --best and --verify-every"),
        (["--best", "rank1"], "--best must be one of ['accuracy', 'auc', 'tar_at_far_0.1'"),
        (["--loggers", "tensorboard,x"], "loggers must be of tensorboard, wandb, mlflow, got 'x'"),
    ],
)
def test_options_that_do_not_fit_are_refused(trained, tmp_path, options, message):
    shown = refused("train", "--data", trained[0].parent / "faces", *GIVEN, *options,
                    "--output", tmp_path / "run")  # fmt: skip
    assert message in " ".join(shown.split())
    assert not (tmp_path / "run").exists()


def test_a_file_that_verifies_on_nobody_is_refused(trained, tmp_path):
    (tmp_path / "run.toml").write_text("holdout = 0\nverify_every = 1\n")
    options = ["--config", tmp_path / "run.toml", "--output", tmp_path / "run"]
    shown = refused("train", "--data", trained[0].parent / "faces", *options)
    assert "need people to verify on, got holdout 0" in " ".join(shown.split())


def test_a_log_begins_with_the_lines_before_its_file(tmp_path):
    import io

    console = LoggedConsole(file=io.StringIO())
    console.print("[bold]first[/bold]")
    console.log_to(tmp_path / "log.txt")
    console.print("second " * 30, soft_wrap=True)
    console.note("only in the file")
    text = (tmp_path / "log.txt").read_text()
    assert text.splitlines() == ["first", ("second " * 30).rstrip(), "only in the file"]
    assert "only in the file" not in console.file.getvalue()
    console.log_to(None)
    console.print("elsewhere")
    assert (tmp_path / "log.txt").read_text() == text
    quiet = LoggedConsole(file=io.StringIO(), quiet=True)
    quiet.print("not shown")
    quiet.log_to(tmp_path / "quiet.txt")
    assert not (tmp_path / "quiet.txt").exists()


def test_scores_of_listed_pairs_are_those_of_all(tmp_path):
    from synface.evaluation import scores_of_all, scores_of_pairs

    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(12, 4, dtype=torch.float64))
    labels = torch.arange(12) // 3
    first, second = torch.triu_indices(12, 12, 1)
    cosine, same = (rows[first] * rows[second]).sum(1), labels[first] == labels[second]
    wanted, found = scores_of_all(rows, labels, None), scores_of_pairs(cosine, same, first, second)
    for kind in ("genuine", "impostor"):
        assert getattr(found.densities, kind).tolist() == pytest.approx(
            getattr(wanted.densities, kind).tolist()
        )
        pairs = getattr(found, kind)
        assert [p[1:] for p in pairs] == [p[1:] for p in getattr(wanted, kind)]
        assert [p.score for p in pairs] == pytest.approx([p.score for p in getattr(wanted, kind)])
    assert len(found.genuine) == 6
