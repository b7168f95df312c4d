"""The best checkpoint, early stopping, and the loggers of a run."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from synface import checkpoint
from synface.common.files import CheckpointError
from synface.data import embedded_faces
from synface.training import load_backbone, train
from synface.training.selection import Selection

from tests.helpers.ranks import on_ranks
from tests.helpers.training import SMALL, same, state

CONFIG = replace(SMALL, epochs=6)  # of 3 steps
AUC = {3: 0.5, 6: 0.7, 9: 0.6, 12: 0.7, 15: 0.9, 18: 0.1}


def people(identities: int = 6):
    return embedded_faces(images_per_identity=4, size=16, identities=identities)


class Given:
    """A verification with given results, by the number of calls."""

    def __init__(self, values=None, first: int = 0) -> None:
        self.values = list(AUC.values()) if values is None else values
        self.calls = first

    def __call__(self, backbone) -> dict[str, float]:
        self.calls += 1
        return {"auc": self.values[self.calls - 1], "threshold": 0.3}


def rows(run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "verification.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(tmp_path):
    options = {"verify_every": 1, "best": "auc"}
    result = train(CONFIG, people(), tmp_path / "run", verify=Given(), **options)
    assert [(row["step"], row["auc"]) for row in rows(tmp_path / "run")] == list(AUC.items())
    assert result.best == "auc was highest, 0.9000, after epoch 5"
    best = checkpoint.find(tmp_path / "run" / "best")
    assert checkpoint.load_state(best)["step"] == 15
    plain = train(CONFIG, people(), tmp_path / "plain")
    assert same(state(plain), state(result))  # verification changes no training
    whole, _ = load_backbone(tmp_path / "run" / "best")
    cut = train(CONFIG, people(), tmp_path / "cut", stop_after=14)
    assert same(dict(whole.state_dict()), dict(cut.backbone.state_dict()))
    assert train(CONFIG, people(), tmp_path / "none", verify=Given()).best is None
    assert len(rows(tmp_path / "none")) == 1  # at the end
    assert not (tmp_path / "none" / "best").exists()


@pytest.mark.parametrize("stop_after", [7, 9, 13])
def test_a_resumed_run_selects_what_an_uninterrupted_one_does(tmp_path, stop_after):
    options = {"verify_every": 1, "best": "auc"}
    config = replace(CONFIG, checkpoint_every=2)
    train(config, people(), tmp_path, verify=Given(), stop_after=stop_after, **options)
    first = checkpoint.load_state(checkpoint.find(tmp_path))["step"]
    verify = Given(first=first // 3)
    result = train(config, people(), tmp_path, verify=verify, resume=True, **options)
    assert [(row["step"], row["auc"]) for row in rows(tmp_path)] == list(AUC.items())
    assert result.best == "auc was highest, 0.9000, after epoch 5"
    assert checkpoint.load_state(checkpoint.find(tmp_path / "best"))["step"] == 15


def test_a_discarded_best_checkpoint_is_removed(tmp_path):
    """The checkpoint of step 6 is selected; those of steps that a resumed run repeats are not."""
    options = {"verify_every": 1, "best": "auc"}
    config = replace(CONFIG, checkpoint_every=2)
    values = [0.5, 0.7, 0.8, 0.9]
    train(config, people(), tmp_path, verify=Given(values), stop_after=10, **options)
    assert checkpoint.load_state(checkpoint.find(tmp_path / "best"))["step"] == 9
    values = [0.5, 0.7, 0.1, 0.1, 0.1, 0.1]
    train(config, people(), tmp_path, verify=Given(values, 2), resume=True, **options)
    assert checkpoint.load_state(checkpoint.find(tmp_path / "best"))["step"] == 6


def test_another_measure_begins_with_the_checkpoint_that_is_there(tmp_path):
    """The row of step 3 has the highest accuracy, but no checkpoint of it is kept."""
    found = [{"auc": a, "accuracy": b} for a, b in ((0.5, 0.9), (0.7, 0.6), (0.6, 0.8), (0.5, 0.7))]
    config, verify = replace(CONFIG, epochs=4), iter(found)
    options = {"verify": lambda _: next(verify), "verify_every": 1}
    first = train(config, people(), tmp_path, best="auc", stop_after=8, **options)
    assert first.best.startswith("auc was highest, 0.7000")
    result = train(config, people(), tmp_path, best="accuracy", resume=True, **options)
    assert result.best == "accuracy was highest, 0.7000, after epoch 4"
    assert checkpoint.load_state(checkpoint.find(tmp_path / "best"))["step"] == 12


def test_a_selection_that_begins_with_a_resumed_run_counts_its_own_verifications(tmp_path):
    options = {"verify_every": 1, "verify": Given([0.9, 0.5, 0.6])}
    config = replace(CONFIG, epochs=3)
    train(config, people(), tmp_path, stop_after=3, **options)
    result = train(config, people(), tmp_path, best="auc", resume=True, **options)
    assert result.best == "auc was highest, 0.6000, after epoch 3"
    assert checkpoint.load_state(checkpoint.find(tmp_path / "best"))["step"] == 9


def test_remnants_of_a_removed_best_checkpoint_do_not_matter(tmp_path):
    options = {"verify_every": 1, "best": "auc", "verify": Given()}
    train(CONFIG, people(), tmp_path, stop_after=8, **options)
    (tmp_path / "best" / "step-00000003" / "state.json").unlink()
    result = train(CONFIG, people(), tmp_path, resume=True, **options)
    assert result.best == "auc was highest, 0.9000, after epoch 5"


def test_a_frozen_backbone_does_not_end_the_run(tmp_path):
    options = {"verify_every": 1, "best": "auc", "patience": 2}
    verify = Given([0.5, 0.5, 0.5, 0.6, 0.7, 0.8])
    result = train(replace(CONFIG, freeze=3.0), people(), tmp_path, verify=verify, **options)
    assert len(result.history) == 18
    assert result.best == "auc was highest, 0.8000, after epoch 6"


def test_a_run_ends_early_and_stays_ended(tmp_path):
    options = {"verify_every": 1, "best": "auc", "patience": 2}
    result = train(CONFIG, people(), tmp_path, verify=Given(), **options)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 9, 12]  # 0.7 again is not better
    assert result.best == (
        "auc was highest, 0.7000, after epoch 2, and not higher in 2 verifications"
    )
    assert len(result.history) == 12
    assert checkpoint.load_state(checkpoint.find(tmp_path))["step"] == 12
    again = train(CONFIG, people(), tmp_path, verify=Given(()), resume=True, **options)
    assert same(state(again), state(result))
    assert again.best == result.best
    options["patience"] = 3  # continues
    result = train(CONFIG, people(), tmp_path, verify=Given(first=4), resume=True, **options)
    assert len(result.history) == 18


class OnRanks:
    """Return a rank's selection and the number of its steps."""

    def __init__(self, output):
        self.output = output

    def __call__(self, rank, ranks):
        verify = Given() if rank == 0 else Given(())  # only the first rank verifies
        options = {"verify": verify, "verify_every": 1, "best": "auc", "patience": 2}
        config = replace(CONFIG, batch_size=12, epochs=4)
        result = train(config, people(), self.output, **options)
        return result.best, len(result.history)


def test_all_ranks_end_early_together(tmp_path):
    found = on_ranks(2, OnRanks(tmp_path / "run"), tmp_path / "ranks")
    best = "auc was highest, 0.7000, after epoch 2, and not higher in 2 verifications"
    assert found == [(best, 8)] * 2
    assert checkpoint.load_state(checkpoint.find(tmp_path / "run" / "best"))["step"] == 4


def test_a_measure_that_is_not_verified_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a measure of the verification \(auc\), got 'rank1'"):
        train(CONFIG, people(), tmp_path, verify=Given(), verify_every=1, best="rank1")
    for options in ({"patience": -1, "best": "auc"}, {"patience": 2}):
        with pytest.raises(ValueError, match="patience must be 0 or more verifications"):
            train(CONFIG, people(), tmp_path / "other", verify=Given(), **options)
    for options in ({"best": "auc"}, {"verify_every": 1}):
        with pytest.raises(ValueError, match="best and verify_every need verify"):
            train(CONFIG, people(), tmp_path / "other", **options)
    assert Selection(None).add({"auc": 1.0}) is False
    found = Selection("auc")
    assert [found.add({"auc": value}) for value in (math.nan, 0.5, math.nan)] == [
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match=r"of the verification \(auc\), got 'threshold'"):
        Selection("threshold").add({"step": 1, "threshold": 0.3, "auc": 0.5})


# -- loggers -------------------------------------------------------------------------------------


@dataclass
class Kept:
    """A logger that keeps its metrics, and cannot be hashed."""

    metrics: list = field(default_factory=list)
    closed: list = field(default_factory=list)

    def log(self, step, metrics):
        self.metrics.append((step, dict(metrics)))

    def close(self, error):
        self.closed.append(type(error))


def test_a_logger_of_ones_own_gets_all_metrics(tmp_path):
    kept = Kept()
    options = {"verify": Given(), "verify_every": 1, "loggers": [kept]}
    result = train(replace(SMALL, clip_norm=1.0), people(), tmp_path, **options)
    training = [metrics for _, metrics in kept.metrics if "training/loss" in metrics]
    names = ("loss", "accuracy", "lr", "gradient_norm")
    assert training == [{f"training/{k}": row[k] for k in names} for row in result.history]
    verified = [(step, m["verification/auc"]) for step, m in kept.metrics if len(m) == 2]
    assert verified == [(2, 0.5), (5, 0.7)]
    assert kept.closed == [type(None)]
    with pytest.raises(ZeroDivisionError):
        train(SMALL, people(), tmp_path / "b", verify=lambda _: 1 / 0, loggers=[kept])
    assert kept.closed == [type(None), ZeroDivisionError]


def test_a_run_goes_on_without_a_logger_that_fails(tmp_path):
    kept = Kept()
    with pytest.warns(UserWarning, match=r"logger Broken failed \(RuntimeError: no connection\)"):
        result = train(SMALL, people(), tmp_path, loggers=[Broken(), kept])
    assert [step for step, _ in kept.metrics] == list(range(6))
    assert len(result.history) == 6


class Broken:
    def log(self, step, metrics):
        raise RuntimeError("no connection")

    def close(self, error): ...


def stand_in(monkeypatch) -> list[tuple]:
    """Put stand-ins of wandb and mlflow, which note their calls, in place of the packages."""
    calls = []

    def noted(name, result=None):
        def call(*arguments, **options):
            calls.append((name, arguments, options))
            return result

        return call

    run = SimpleNamespace(id="w1", log=noted("wandb.log"), finish=noted("wandb.finish"))
    wandb = SimpleNamespace(init=noted("wandb.init", run))
    begun = SimpleNamespace(info=SimpleNamespace(run_id="m1"))
    mlflow = SimpleNamespace(
        start_run=noted("mlflow.start_run", begun),
        log_params=noted("mlflow.log_params"),
        log_metrics=noted("mlflow.log_metrics"),
        end_run=noted("mlflow.end_run"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def test_services_continue_the_log_of_a_resumed_run(tmp_path, monkeypatch):
    calls = stand_in(monkeypatch)
    run = tmp_path / "run"
    options = {"verify": Given([0.5] * 3), "verify_every": 1, "loggers": ("wandb", "mlflow")}
    train(SMALL, people(), run, stop_after=3, **options)
    opened = [(name, options) for name, _, options in calls if "init" in name or "start" in name]
    assert opened[0][1]["config"]["epochs"] == 2
    assert [options.get("id", options.get("run_id")) for _, options in opened] == [None, None]
    assert json.loads((run / "loggers.json").read_text()) == {"wandb": "w1", "mlflow": "m1"}
    assert [name for name, *_ in calls[-2:]] == ["mlflow.end_run", "wandb.finish"]
    logged = [(a[0]["training/loss"], o["step"]) for name, a, o in calls
              if name == "wandb.log" and "training/loss" in a[0]]  # fmt: skip
    calls.clear()
    result = train(SMALL, people(), run, resume=True, **options)
    assert logged == [(row["loss"], row["step"]) for row in result.history[:4]]
    opened = [options for name, _, options in calls if "init" in name or "start" in name]
    assert [each.get("id", each.get("run_id")) for each in opened] == ["w1", "m1"]
    assert [o["step"] for name, _, o in calls if name == "mlflow.log_metrics"] == [3, 4, 5, 5]
    (run / "loggers.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"loggers\.json must hold an object of strings"):
        train(SMALL, people(), run, resume=True, **options)


@pytest.mark.parametrize(
    ("ended_by", "code", "status"),
    [(None, 0, "FINISHED"), (ZeroDivisionError, 1, "FAILED"), (KeyboardInterrupt, 1, "KILLED")],
)
def test_services_hear_how_a_run_ended(tmp_path, monkeypatch, ended_by, code, status):
    def verify(network):
        if ended_by:
            raise ended_by
        return {"auc": 0.5}

    calls = stand_in(monkeypatch)
    with pytest.raises(ended_by) if ended_by else nullcontext():
        train(SMALL, people(), tmp_path / "run", verify=verify, loggers=("wandb", "mlflow"))
    ends = {name: (arguments, options) for name, arguments, options in calls[-2:]}
    assert ends == {"mlflow.end_run": ((status,), {}), "wandb.finish": ((), {"exit_code": code})}


def test_an_unknown_logger_is_refused_before_the_run_begins(tmp_path):
    with pytest.raises(ValueError, match="loggers must be of tensorboard, wandb, mlflow, got 'x'"):
        train(SMALL, people(), tmp_path / "run", loggers=["x"])
    assert not (tmp_path / "run").exists()


def test_values_that_are_equal_do_not_replace_the_best():
    found = Selection("auc", 2)
    assert [found.add({"epoch": i, "auc": v}) for i, v in enumerate([0.5, 0.5])] == [True, False]
    assert (found.best["epoch"], found.since, found.ended) == (0, 1, False)
    assert found.add({"epoch": 2, "auc": float(torch.tensor(0.75))})
    assert found.since == 0
