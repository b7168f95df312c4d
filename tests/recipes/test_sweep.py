"""Sweeps of training runs: workers, errors, interruptions, repeated tries, estimates."""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from synface import checkpoint
from synface.cli.terminal import SweepBar
from synface.common.durations import duration
from synface.common.files import CheckpointError
from synface.recipes import sweep
from synface.recipes.duration import estimate
from synface.recipes.sweep import Cell, run_cells, run_times

from tests.helpers.command_line import call, refused
from tests.helpers.forked import command, forked
from tests.helpers.processes import wait_for
from tests.helpers.sweeps import CONFIG, open_cells, unopened

RECIPE = """
seeds = [0, 1]
rows = ["synthetic"]
[data]
size = 16
embedding_size = 8
identities = 4
images_per_identity = 4
real_identities = 3
held_out_identities = 4
[train]
epochs = 2000
batch_size = 8
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
checkpoint_every = 2000
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, as each of two workers does, since bits depend on it."""
    with sweep.using_threads(1):
        yield
    assert not active_children()


def run(opened, output, **options):
    cells, held = opened()
    return run_cells(cells, held, output, open_cells=opened, **options)


class Seen:
    """A progress bar that keeps what it is told, and acts after some steps."""

    def __init__(self, after: int = 0, act=lambda: None) -> None:
        self.after, self.act, self.steps, self.ended = after, act, [], []
        self.title = ""

    @contextmanager
    def __call__(self, title: str):
        self.title = title
        yield self

    def start(self, total: int, step: int) -> None:
        self.steps.append((step, total))
        if self.after and step >= self.after:
            self.after = 0
            self.act()

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.start(self.steps[-1][1], self.steps[-1][0] + 1)

    def cells(self, done: int, total: int) -> None:
        self.ended.append((done, total))


@pytest.mark.slow
def test_two_workers_give_the_bits_of_this_process(tmp_path):
    opened = partial(open_cells, ("plain", "slow", "plain"))
    one, two = Seen(), Seen()
    found = run(opened, tmp_path / "one", progress=one)
    assert run(opened, tmp_path / "two", progress=two, workers=2) == found
    assert list(found) == ["plain-0", "slow-1", "plain-2"]
    assert {each["steps"] for each in found.values()} == {9}
    assert (tmp_path / "one/slow-1/metrics.jsonl").read_bytes() == (
        tmp_path / "two/slow-1/metrics.jsonl"
    ).read_bytes()
    for seen in (one, two):
        assert (seen.steps[0], seen.steps[-1]) == ((0, 27), (27, 27))
        assert (seen.ended[0], seen.ended[-1]) == ((0, 3), (3, 3))
        assert seen.title.startswith("3 training runs, about ")
    assert two.title.endswith(" with 2 workers")
    took = run_times(tmp_path / "two", found)
    assert took.keys() == found.keys()
    assert all(each["threads"] == 1 and each["seconds"] > 0 for each in took.values())

    # All is there: no worker is started, which could not open the cells.
    cells, held = opened()
    options = {"resume": True, "workers": 2, "open_cells": unopened}
    assert run_cells(cells, held, tmp_path / "two", **options) == found


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize(
    ("kinds", "error", "message"),
    [
        (("slow", "broken", "slow"), ValueError, "^broken-1: no faces here$"),
        (("slow", "dead", "slow"), ChildProcessError, "dead-1: .* ended with exit code 7; if mem"),
    ],
)
@pytest.mark.slow
def test_a_cell_that_fails_stops_the_others(tmp_path, kinds, error, message):
    config = replace(CONFIG, epochs=2000, checkpoint_every=2000)
    with pytest.raises(error, match=message):
        run(partial(open_cells, kinds, config), tmp_path, workers=2)
    assert not active_children()
    assert not list(tmp_path.rglob("result.json"))
    for each in tmp_path.glob("slow-0/checkpoints"):  # unless it was still starting
        assert checkpoint.load_state(checkpoint.find(each.parent))["step"] < 6000


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_an_error_is_named_in_this_process_too_and_is_itself(tmp_path):
    with pytest.raises(ValueError, match=r"^broken-1: no faces here$"):
        run(partial(open_cells, ("plain", "broken")), tmp_path)
    cells, held = open_cells(("plain", "plain"))
    with pytest.raises(FileNotFoundError, match="nobody") as raised:
        run_cells(cells, held, tmp_path / "two", workers=2, open_cells=unopened)
    assert raised.value.filename == "here"
    assert "in unopened" in str(raised.value.__cause__)  # the worker's traceback


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_an_interrupted_run_of_two_workers_goes_on(tmp_path):
    opened = partial(open_cells, ("slow", "slow"), replace(CONFIG, epochs=20, checkpoint_every=20))
    whole = run(opened, tmp_path / "whole")
    seen = Seen(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(opened, tmp_path / "apart", progress=seen, workers=2)
    assert not active_children()
    done = {}
    for name in whole:
        folder = tmp_path / "apart" / name
        if folder.exists():
            state = checkpoint.load_state(checkpoint.find(folder))
            done[name] = state["step"]
            assert len((folder / "metrics.jsonl").read_text().splitlines()) == state["step"]
    assert 6 <= sum(done.values()) < 120
    seen = Seen()
    assert run(opened, tmp_path / "apart", resume=True, progress=seen, workers=2) == whole
    left = 120 - sum(done.values())
    assert seen.steps[-1] == (left, left)
    took = run_times(tmp_path / "apart", whole)
    assert [took[name]["seconds"] for name in done] == [None] * len(done)


@contextmanager
def started(folder: Path):
    """Run the command in a session of its own, until both workers train."""
    file, output, shown = folder / "long.toml", folder / "run", folder / "shown"
    file.write_text(RECIPE)
    words = ["recipe", "synface", "--config", file, "--output", output, "--workers", "2"]
    logs = [output / f"synthetic-seed-{seed}" / "metrics.jsonl" for seed in (0, 1)]

    def both_train() -> bool:
        assert process.is_alive(), shown.read_text()
        return all(log.exists() and log.stat().st_size for log in logs)

    with forked(shown, command, *words) as process:
        wait_for(both_train, 240)
        yield process, output, shown


def members(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "whole_group", "code", "said"),
    [
        (signal.SIGINT, True, 130, "interrupted: continue with synface recipe synface"),
        (signal.SIGTERM, True, 143, "terminated: continue with synface recipe synface"),
        (signal.SIGTERM, False, 143, "terminated: continue with synface recipe synface"),
        (signal.SIGKILL, False, -9, ""),
    ],
)
def test_no_worker_is_left_behind(tmp_path, number, whole_group, code, said):
    with started(tmp_path) as (process, output, shown):
        (os.killpg if whole_group else os.kill)(process.pid, number)
        process.join(60)
        wait_for(lambda: not members(process.pid))
        text = shown.read_text()
        assert process.exitcode == code, text
    assert said in text
    assert "Traceback" not in text
    for seed in (0, 1):  # both have finished their step, and stored it
        folder = output / f"synthetic-seed-{seed}"
        steps = len((folder / "metrics.jsonl").read_text().splitlines())
        assert checkpoint.load_state(checkpoint.find(folder))["step"] == steps > 0


def test_what_cannot_run_is_named(tmp_path):
    cells, held = open_cells(("plain", "plain"))
    twice = [cells[0], replace(cells[1], name="plain-0")]
    with pytest.raises(ValueError, match="different names, got more than one 'plain-0'"):
        run_cells(twice, held, tmp_path)
    with pytest.raises(ValueError, match="cell must be one of plain-0, plain-1, got 'x'"):
        run_cells(cells, held, tmp_path, only="x")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_cells(cells, held, tmp_path, workers=0)
    with pytest.raises(ValueError, match="2 workers need open_cells"):
        run_cells(cells, held, tmp_path, workers=2)
    with pytest.raises(ValueError, match=r"target_top1 must be in \(0, 1\], got 1.5"):
        replace(cells[0], target_top1=1.5, max_steps=9)
    with pytest.raises(ValueError, match=r"target_top1 must be in \(0, 1\], got None"):
        replace(cells[0], max_steps=9)
    with pytest.raises(TypeError, match="max_steps"):
        replace(cells[0], target_top1=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_is_repeated_until_it_reaches_its_target(tmp_path):
    never = partial(open_cells, ("plain",), target_top1=1.0, max_steps=22)
    found = run(never, tmp_path / "never", progress=(seen := Seen()))["plain-0"]
    assert [each["steps"] for each in found["tries"]] == [9, 15, 21]  # 3 steps in an epoch
    assert not found["reached"]
    assert (found["steps"], found["top1"]) == (21, found["tries"][-1]["top1"])
    assert seen.steps[-1] == (45, 45)
    longer = partial(open_cells, ("plain",), replace(CONFIG, epochs=5, warmup_epochs=0.5 * 5 / 3))
    assert run(longer, tmp_path / "longer")["plain-0"]["top1"] == found["tries"][1]["top1"]

    # Without its result, the tries are found in their folders, and lead to the same.
    (tmp_path / "never" / "plain-0" / "result.json").unlink()
    logs = {f: f.stat().st_mtime_ns for f in tmp_path.glob("never/**/tensors.safetensors")}
    assert run(never, tmp_path / "never", resume=True)["plain-0"] == found
    assert {f: f.stat().st_mtime_ns for f in logs} == logs

    least = min(each["top1"] for each in found["tries"])
    soon = partial(open_cells, ("plain",), target_top1=max(0.01, least), max_steps=22)
    reached = run(soon, tmp_path / "soon", workers=2)["plain-0"]
    assert reached["reached"]
    assert reached["tries"] == found["tries"][: len(reached["tries"])]
    with pytest.raises(CheckpointError, match=r"its target_top1 is 1\.0, expected"):
        run(soon, tmp_path / "never", resume=True)


def test_tries_grow_by_half_up_to_the_limit():
    cell = Cell("x", replace(CONFIG, epochs=1), lambda: None, 24, target_top1=0.9, max_steps=20)
    assert [config.epochs for config in cell.tries(24)] == [1, 2, 3, 5, 6]
    assert [config.epochs for config in replace(cell, max_steps=1).tries(24)] == [1]


def test_the_estimate_grows_with_steps_and_images():
    class Generator:
        embedding_size, style_size, image_shape = 8, 2, (16, 16, 1)
        calls = 0

        def __init__(self) -> None:
            self.description = {"kind": "slow"}

        def generate(self, embedding, style, seed):
            self.calls += 1
            time.sleep(0.01)
            return torch.zeros(len(seed), 16, 16, 1, dtype=torch.uint8)

    (cell, *_), _ = open_cells(("plain",))
    made = Generator()
    twice = replace(cell, config=replace(CONFIG, epochs=6, seed=3))
    each = replace(cell, generator=made)
    began = time.perf_counter()
    one, two, every, once = estimate([cell, twice, each, replace(each, generated=24)], (16, 16, 1))
    assert time.perf_counter() - began < 6
    assert 0 < one < 60
    assert two == pytest.approx(2 * one)  # both have the same kind of step, measured once
    assert (every - one) == pytest.approx(3 * (once - one), rel=1e-6)
    assert once - one >= 24 * 0.01 / 32
    assert made.calls == 2


def test_default_workers(monkeypatch):
    monkeypatch.setattr(sweep, "cores", lambda: 6)
    for free, count in ((None, 6), (3.5 * 2**30, 3), (2**20, 1)):
        monkeypatch.setattr(sweep, "available_memory", lambda free=free: free and int(free))
        assert sweep.default_workers() == count
    with sweep.using_threads(2):
        assert [sweep.share_of_threads(n) for n in (1, 2, 3, 6, 9)] == [2, 2, 2, 1, 1]


def test_durations_are_round():
    assert [duration(s) for s in (0.2, 40.4, 99.6, 1440, 9000)] == [
        "1 s", "40 s", "2 min", "24 min", "2.5 h",
    ]  # fmt: skip


def test_the_bar_says_how_many_and_how_long(capsys):
    bar = SweepBar("3 training runs, about 2 min", " (--quick: less)")
    bar.cells(1, 3)
    bar.start(100, 20)
    bar.began -= 10
    for _ in range(20):
        bar.step(1.0, 0.5, 8)
    task = bar.progress.tasks[0]
    assert (task.description, task.completed, task.total) == ("runs 1 of 3", 40, 100)
    assert task.fields["note"] == "· 30 s left"
    bar.start(100, 100)
    assert task.fields["note"] == ""


@pytest.mark.usefixtures("blank_figures")
def test_options_that_exclude_each_other(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text(RECIPE)
    for recipe in (["recipe", "synface"], ["recipe", "hyperface"], ["study"]):
        text = refused(*recipe, "--quick", "--config", file, "--output", tmp_path / "run")
        assert "--config has no effect with --quick" in text
        text = refused(*recipe, "--cell", "x", "--workers", "2", "--output", tmp_path / "run")
        assert "--workers has no effect with --cell" in text
    short = tmp_path / "short.toml"
    short.write_text(RECIPE.replace("2000", "1"))
    text = call(
        "recipe", "synface", "--config", short, "--output", tmp_path / "run", "--workers", 1
    )
    assert "2 training runs, about " in text
    stored = json.loads((tmp_path / "run/synthetic-seed-0/result.json").read_text())
    assert stored["took"]["threads"] == 1
    assert math.isfinite(stored["took"]["seconds"])
    page = (tmp_path / "run/report/synface.md").read_text()
    assert "threads: 1, " in page
    assert "; 2 training runs, " in page
