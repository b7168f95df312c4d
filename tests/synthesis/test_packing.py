"""The packer reaches the known optima, resumes to the bit, and loses nothing."""

import json
import math
import os
import re
import resource
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synface import checkpoint
from synface.common.files import CheckpointError
from synface.synthesis.packing import PackConfig, Packer, bounds, closest_pair, pack, packer
from synface.synthesis.packing.optimizer import SphereAdam
from synface.synthesis.packing.packer import _Run

import synface_kernels as sk
from tests.helpers import codes
from tests.helpers.command_line import call, refused
from tests.helpers.forked import command, finished, forked

SMALL = PackConfig(40, 6, steps=60, seed=3)
LSE = replace(SMALL, objective="lse")


class Silent:
    def __init__(self, *_):
        self.told = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, done, seconds, worst):
        self.told.append((done, seconds, worst))


# ---- quality -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "dim", "worst"),
    [(9, 8, -1 / 8), (16, 8, 0.0), (12, 3, 5**-0.5)],
    ids=["simplex", "orthoplex", "icosahedron"],
)
def test_reaches_known_optima(count, dim, worst):
    packed = Packer(PackConfig(count, dim, steps=250, restarts=2)).run()
    assert packed.worst == pytest.approx(worst, abs=1e-4)
    assert packed.gap == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("count", [7, 8, 9, 10, 24])
def test_tammes(count):
    packed = Packer(PackConfig(count, 3, steps=250, restarts=2)).run()
    angle = math.degrees(math.acos(packed.worst))
    assert codes.TAMMES[count] - 0.2 < angle < codes.TAMMES[count] + 1e-3


def test_the_annealed_objective_beats_the_closest_pair_and_random_points():
    worst = {
        objective: Packer(PackConfig(300, 24, objective, steps=100)).run().worst
        for objective in ("lse", "hyperface", "langevin")
    }
    bound = bounds.best(300, 24).cosine
    assert bound < worst["lse"] < worst["langevin"] < bounds.random_worst(300, 24)
    assert worst["lse"] < worst["hyperface"] < bounds.random_worst(300, 24)
    assert worst["lse"] - bound < 0.1


def test_batches_spread_points_too():
    config = PackConfig(1200, 16, steps=300, batch=300)
    packed = Packer(config).run()
    assert packed.worst < bounds.random_worst(1200, 16) - 0.1
    assert [step for _, step, _ in packed.history] == [300]  # exact only at the end
    assert packed.worst == closest_pair(packed.points)[0]


def test_what_is_reported_is_exact():
    told = Silent()
    packed = Packer(SMALL).run(progress=told)
    cosines = (packed.points @ packed.points.T).fill_diagonal_(-2)
    assert packed.worst == pytest.approx(cosines.max().item(), abs=1e-12)
    i, j = packed.pair
    assert cosines[i, j].item() == pytest.approx(packed.worst, abs=1e-12)
    assert (packed.points.norm(dim=1) - 1).abs().max() < 1e-12
    assert packed.worst == min(worst for _, _, worst in packed.history)
    assert [done for done, _, _ in told.told] == pytest.approx([(i + 1) / 60 for i in range(60)])
    assert told.told[-1][2] in [worst for _, _, worst in packed.history]


def test_a_gallery_keeps_points_close():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(30, 6, generator=generator)
    gallery[:, 0] = gallery[:, 0].abs() + 2  # to one side
    config = replace(SMALL, alpha=5.0)

    def distance(points):
        return (1 - sk.nearest_neighbors(points, gallery.double())[0]).mean()

    for objective in ("lse", "hyperface"):
        config = replace(config, objective=objective, lr=0.1)
        free = Packer(config).run()
        held = Packer(config, gallery=gallery).run()
        assert distance(held.points) < 0.5 * distance(free.points), objective
        unweighted = Packer(replace(config, alpha=0.0), gallery=gallery).run()
        assert torch.equal(unweighted.points, free.points)


def test_a_start_is_never_made_worse():
    code = codes.cell_600()
    packed = Packer(PackConfig(120, 4, steps=30), start=3 * code).run()
    assert packed.worst <= codes.GOLDEN / 2 + 1e-12
    assert closest_pair(code)[0] == pytest.approx(codes.GOLDEN / 2, abs=1e-12)


def test_minutes_are_kept():
    began = time.perf_counter()
    packed = Packer(PackConfig(60, 8, minutes=0.01, restarts=2)).run()
    assert time.perf_counter() - began < 0.6 * 2 + 2
    assert 0 < packed.history[-1][0] <= 0.7
    assert packed.worst < bounds.random_worst(60, 8)


# ---- the optimizer -------------------------------------------------------------------------------


def test_sphere_adam_turns_with_the_points():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(700, 5, dtype=torch.float64, generator=generator))
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))[0]
    turned = x @ turn
    two = [SphereAdam(700, 5, x.dtype, x.device) for _ in range(2)]
    for _ in range(5):
        gradient = torch.randn(700, 5, dtype=torch.float64, generator=generator)
        before = x.clone()
        two[0].step(x, gradient, 0.1)
        two[1].step(turned, gradient @ turn, 0.1)
        assert (x @ turn - turned).abs().max() < 1e-12
        assert (x.norm(dim=1) - 1).abs().max() < 1e-12
        assert (two[0].mean * before).sum(1).abs().max() < 1e-12  # tangent where it was applied
    assert (x - before).norm(dim=1).max() < 0.3


def test_the_first_step_has_the_length_asked_for_and_no_force_moves_nothing():
    x = torch.eye(3)
    gradient = torch.tensor([[5.0, 0, 1e-3], [0, 0, 0], [1e-35, 0, 7]])
    SphereAdam(3, 3, x.dtype, x.device).step(x, gradient, 0.01)
    expected = torch.tensor([[1, 0, -0.01], [0, 1, 0], [0, 0, 1]])
    assert torch.allclose(x, expected, atol=1e-4)


def test_rows_are_stepped_as_the_whole_is():
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(20, 4, generator=generator))
    gradient = torch.randn(20, 4, generator=generator)
    whole, parts = x.clone(), x.clone()
    SphereAdam(20, 4, x.dtype, x.device).step(whole, gradient, 0.1)
    optimizer = SphereAdam(20, 4, x.dtype, x.device)
    for rows in torch.randperm(20, generator=generator).split(7):
        optimizer.step_rows(parts, rows, gradient[rows], 0.1)
    assert torch.allclose(whole, parts, atol=1e-7)


# ---- the same again, and resuming ----------------------------------------------------------------

VARIANTS = {
    "orbit": SMALL,
    "orbit, restarts": replace(SMALL, restarts=2, symmetry="cyclic"),
    "orbit, many": PackConfig(310, 20, steps=60, polish=4, order=24),
    "orbit, phases": PackConfig(1200, 40, steps=60),
    "lse": LSE,
    "restarts": replace(LSE, restarts=3, steps=20),
    "batch": replace(SMALL, batch=11),
    "hyperface": replace(SMALL, objective="hyperface"),
    "langevin": replace(SMALL, objective="langevin"),
    "float32": replace(LSE, count=1001, steps=30),
}


@cache
def whole_run(config):
    """Return what a run without a break packs, which no test changes."""
    return Packer(config).run()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_points_come_again_with_checkpoints_and_without(name, tmp_path):
    config = VARIANTS[name]
    whole = whole_run(config)
    assert torch.equal(whole.points, Packer(config).run().points)
    assert torch.equal(whole.points, Packer(config).run(tmp_path / "uninterrupted").points)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("stops", [(1,), (25, 37), (20, 62)])
def test_resumes_to_the_bit(name, stops, tmp_path):
    config = VARIANTS[name]
    whole = whole_run(config)
    last = 62 if config.polish else 29  # within the polish, or the steps of every variant
    for i, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            Packer(config).run(tmp_path / "run", resume=i > 0, stop_after=min(stop, last))
    resumed = Packer(config).run(tmp_path / "run", resume=True)
    assert torch.equal(whole.points, resumed.points)
    assert (whole.worst, whole.pair) == (resumed.worst, resumed.pair)
    assert [row[1:] for row in whole.history] == [row[1:] for row in resumed.history]
    done = Packer(config).run(tmp_path / "run", resume=True)  # all done: only the last look
    assert torch.equal(whole.points, done.points)


def test_other_seeds_are_other_packings():
    points = [Packer(replace(SMALL, seed=seed)).run().points for seed in (0, 1)]
    assert not torch.equal(*points)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Packer(SMALL).run(tmp_path, stop_after=5)
    for change, message in (
        ({"seed": 4}, "another run: its seed is 3, expected 4"),
        ({"steps": 61}, "another run: its steps is 60, expected 61"),
        ({"count": 41}, "another run: its count is 40, expected 41"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Packer(replace(SMALL, **change)).run(tmp_path, resume=True)
    with pytest.raises(
        CheckpointError, match="another run: its objective is 'orbit', expected 'lse'"
    ):
        Packer(SMALL, gallery=torch.ones(1, 6)).run(tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        Packer(LSE).run(tmp_path / "lse", stop_after=5)
    with pytest.raises(CheckpointError, match="another run: its gallery is None"):
        Packer(LSE, gallery=torch.ones(1, 6)).run(tmp_path / "lse", resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        Packer(SMALL).run(tmp_path)
    found = checkpoint.find(tmp_path)
    (found / checkpoint.TENSORS).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cut short"):
        Packer(SMALL).run(tmp_path, resume=True)


def test_the_clock_goes_on_where_it_was(tmp_path):
    """After 25 s of a minute, with 10 s for the last evaluation: the second of two restarts."""
    packer = Packer(PackConfig(40, 6, "lse", minutes=1, restarts=2))
    run, resumed = (_Run(packer, tmp_path, None) for _ in range(2))
    run.seconds, run.check_seconds, run.restart, run.step = 25.0, 10.0, 1, 7
    run._save()
    resumed._load()
    assert resumed._where() == run._where()
    assert resumed._where()[0] == 1


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["count", "dim", "steps", "restarts", "batch", "seed"])
@pytest.mark.parametrize("value", [5.0, "5", True])
def test_integers_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int.*, got {type(value).__name__}"):
        replace(SMALL, **{name: value})


@pytest.mark.parametrize("name", ["alpha", "lr", "minutes"])
@pytest.mark.parametrize("value", ["1", (1,), False])
def test_numbers_are_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number .*got {type(value).__name__}"):
        replace(SMALL, **{"steps": None, name: value})
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        replace(SMALL, **{"steps": None, name: math.nan})


@pytest.mark.parametrize("name", ["lr", "minutes"])
def test_nothing_is_too_little(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        replace(SMALL, **{"steps": None, name: 0})


@pytest.mark.parametrize("name", ["gallery", "start"])
def test_rows_are_floating_tensors(name):
    rows = torch.eye(40, 6) + 1
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        Packer(SMALL, **{name: rows.tolist()})
    with pytest.raises(ValueError, match=rf"{name} must be floating point .*got int64 \(40, 6\)"):
        Packer(SMALL, **{name: rows.long()})
    with pytest.raises(TypeError, match=r"device must be a str or torch\.device, got int 3"):
        Packer(SMALL, device=3)


# ---- files ---------------------------------------------------------------------------------------


def run_pack(output, config=SMALL, objectives=("lse",), **options):
    packers = [Packer(replace(config, objective=objective)) for objective in objectives]
    return pack(packers, output, progress=Silent, **options)


def test_files(tmp_path):
    output = tmp_path / "new" / "packed.safetensors"
    lse, hyperface = run_pack(output, objectives=("lse", "hyperface"))
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "packed-hyperface.safetensors",
        "packed.png",
        "packed.safetensors",
    ]
    assert torch.equal(load_file(output)["embeddings"], lse.points)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["objective"] == "lse"
    assert float(metadata["worst_cosine"]) == lse.worst
    assert float(metadata["bound"]) == lse.bound.cosine
    assert metadata["bound_name"] == lse.bound.name == "Delsarte's linear program"
    assert json.loads(metadata["worst_pair"]) == list(lse.pair)
    assert json.loads(metadata["seed"]) == 3
    assert (output.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    assert hyperface.config.objective == "hyperface"


def test_nothing_is_overwritten_unasked(tmp_path):
    output = tmp_path / "packed.safetensors"
    run_pack(output)
    before = output.read_bytes()
    with pytest.raises(FileExistsError, match=r"packed.safetensors exists: .*--overwrite"):
        run_pack(output, replace(SMALL, seed=9))
    assert output.read_bytes() == before
    run_pack(output, replace(SMALL, seed=9), overwrite=True)
    assert output.read_bytes() != before
    output.unlink()
    with pytest.raises(FileExistsError, match=r"packed\.png exists"):
        run_pack(output)
    with pytest.raises(ValueError, match=r"must be a .safetensors file"):
        run_pack(tmp_path / "packed.npy")
    with pytest.raises(ValueError, match="given once"):
        run_pack(tmp_path / "two.safetensors", objectives=("lse", "lse"))
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run_pack(tmp_path / "two.safetensors", resume=True)


@pytest.mark.slow
def test_resuming_does_not_replace_what_another_run_finished(tmp_path):
    output = tmp_path / "packed.safetensors"
    langevin = Packer(VARIANTS["langevin"])
    with pytest.raises(KeyboardInterrupt):
        langevin.run(tmp_path / "packed-langevin.checkpoints", stop_after=20)
    run_pack(output)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(FileExistsError, match=r"packed.safetensors exists: .*--overwrite"):
        run_pack(output, objectives=["langevin"], resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    (packed,) = run_pack(output, objectives=["langevin"], resume=True, overwrite=True)
    assert torch.equal(load_file(output)["embeddings"], packed.points)
    assert torch.equal(packed.points, whole_run(VARIANTS["langevin"]).points)


@contextmanager
def full_disk():
    """Limit the size of files: points fit, points with moments do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path):
    output = tmp_path / "packed.safetensors"
    output.write_bytes(b"what was there")
    packed = whole_run(SMALL)
    with full_disk(), pytest.raises(OSError, match=r"packed\.safetensors cannot be written"):
        packed.save(output, overwrite=True)
    assert output.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["packed.safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_pack_stopped(tmp_path, 20)
    with full_disk(), pytest.raises(OSError, match="cannot be written"):
        Packer(SMALL).run(tmp_path, resume=True, stop_after=40)
    resumed = Packer(SMALL).run(tmp_path, resume=True)
    assert torch.equal(resumed.points, whole_run(SMALL).points)


def run_pack_stopped(folder, step):
    Packer(SMALL).run(folder, stop_after=step)


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_command_packs_and_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call("pack", "--count", 40, "--dim", 6, "--steps", 60, "--seed", 3)
    packed = whole_run(SMALL)
    assert f"worst cosine {packed.worst:.6f}" in shown
    assert f"its lower bound {packed.bound.cosine:.4f} (Delsarte's linear program)" in shown
    assert "worst 0." in shown
    checked = call("pack", "--check", "packed.safetensors")
    # Pairs of a symmetric code are equally near, and the file's rows are compared in float32.
    i, j = (int(row) for row in re.findall(r"row (\d+) of packed\.safetensors", checked))
    assert f"worst cosine {packed.worst:.6f}: row" in checked
    assert i < j
    assert (packed.points[i] @ packed.points[j]).item() == pytest.approx(packed.worst, abs=1e-6)
    other = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    other[17] = 2 * packed.points[5].numpy()  # a leak
    np.save(tmp_path / "other.npy", other)
    leak = call("pack", "--check", "packed.safetensors", "--against", "other.npy")
    assert "worst cosine 1.000000: row 5 of packed.safetensors and row 17 of other.npy" in leak


def test_command_takes_the_search_for_orbits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = call(
        *("pack", "--count", 310, "--dim", 12, "--steps", 20, "--objective", "orbit"),
        *("--objective", "lse", "--symmetry", "antipodal", "--order", 10, "--polish", 2),
    )
    assert "of points in pairs x and −x: 0." in shown
    assert re.search(r"orbit: worst cosine 0\.\d+ .* 22 steps", shown)
    with safe_open(tmp_path / "packed.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["objective"], metadata["order"], metadata["polish"]) == ("orbit", "10", "2")
    with safe_open(tmp_path / "packed-lse.safetensors", "pt") as file:
        assert file.metadata()["order"] == "null"


def pack_in(folder, *words):
    os.chdir(folder)
    command(*words)


@pytest.mark.slow
def test_files_of_equal_packings_are_equal(tmp_path, monkeypatch):
    """No clock is in them, nothing of the process, and not safetensors' random metadata order."""
    words = ["pack", "--count", "40", "--dim", "6", "--steps", "30", "--seed", "3"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    call(*words)
    code, shown = finished(tmp_path / "shown", pack_in, tmp_path / "b", *words)
    assert code == 0, shown
    for file in ("packed.safetensors", "packed.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "1", "--dim", "4"], "count must be at least 2, got 1"),
        (["--count", "9", "--dim", "1"], "dim must be at least 2, got 1"),
        (["--count", "9"], "needs --count and --dim"),
        (["--count", "9", "--dim", "4", "--objective", "best"], "objective must be one of"),
        (["--count", "9", "--dim", "4", "--steps", "5", "--minutes", "1"], "not both"),
        (["--count", "9", "--dim", "4", "--steps", "0"], "steps must be at least 1, got 0"),
        (["--count", "9", "--dim", "4", "--batch", "10"], r"batch must be in \[2, count = 9\]"),
        (
            ["--count", "9", "--dim", "4", "--batch", "5", "--objective", "hyperface"],
            "batch needs the objective 'lse'",
        ),
        (
            ["--count", "9", "--dim", "4", "--gallery", "good.npy"],
            r"gallery must be floating point of shape \(M, 4\), got float32 \(5, 3\)",
        ),
        (
            ["--count", "9", "--start", "good.npy"],
            r"start must be .*shape \(9, 3\), got .*\(5, 3\)",
        ),
        (["--count", "0", "--start", "good.npy"], "count must be at least 2, got 0"),
        (["--count", "9", "--dim", "4", "--device", "nope"], "device must be .* got 'nope'"),
        (["--count", "9", "--dim", "4", "--device", "cuda:99"], "device must be .* got 'cuda:99'"),
        (["--start", "good.npy", "--restarts", "2"], "restarts must be 1 with a start"),
        (["--start", "zero.npy"], "1 of 5 rows are zero.*row 2"),
        (["--start", "good.npy", "--objective", "orbit"], "with a start, got 'orbit'"),
        (["--count", "40", "--dim", "6", "--order", "7"], "order must divide count = 40"),
        (["--count", "40", "--dim", "6", "--symmetry", "odd"], "symmetry must be one of"),
        (["--count", "9", "--dim", "4", "--objective", "lse", "--order", "3"], "--objective orbit"),
        (["--check", "infinite.npy"], "1 of 5 rows are not finite.*row 3"),
        (["--check", "pickle.npy"], "not a whole .npy array"),
        (["--check", "one.safetensors"], "must have two rows or more, got 1"),
        (["--check", "good.npy", "--against", "one.safetensors"], "same dimension, got 3 and 4"),
        (["--check", "missing.npy"], "cannot be read"),
        (["--against", "good.npy"], "--against needs --check"),
        (["--count", "9", "--dim", "4", "--resume"], "nothing to resume"),
        (["--count", "9", "--dim", "4", "--output", "good.npy"], "must be a .safetensors file"),
        (["--count", "9", "--dim", "4", "--output", "one.safetensors"], "exists: .*--overwrite"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message, monkeypatch):
    good = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.save(tmp_path / "good.npy", good)
    zero, infinite = good.copy(), good.copy()
    zero[2], infinite[3, 1] = 0, np.inf
    np.save(tmp_path / "zero.npy", zero)
    np.save(tmp_path / "infinite.npy", infinite)
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    save_file({"embeddings": torch.ones(1, 4)}, tmp_path / "one.safetensors")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    shown = refused("pack", *arguments)
    assert re.search(message, shown)
    assert "Traceback" not in shown
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def pack_with_checkpoints(folder, *words):
    packer.CHECKPOINT_SECONDS = 0.0
    pack_in(folder, *words)


@pytest.mark.parametrize(
    "blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda x: x.name
)
@pytest.mark.slow
def test_a_blow_loses_at_most_what_came_after_the_checkpoint(
    blow, tmp_path, monkeypatch, blank_figures
):
    """A signal at any time, with checkpoints after every step; `--resume` gives the same bits."""
    arguments = ["pack", "--count", "40", "--dim", "6", "--steps", "200", "--seed", "3"]
    folder, output = tmp_path / "packed-orbit.checkpoints", tmp_path / "shown"
    with forked(output, pack_with_checkpoints, tmp_path, *arguments) as running:
        limit = time.monotonic() + 60
        while len(checkpoint.checkpoints(folder)) < 2 and time.monotonic() < limit:
            time.sleep(0.005)
        os.kill(running.pid, blow)
        running.join(60)
    if blow != signal.SIGKILL:
        assert running.exitcode == 128 + blow
        assert "with --resume to continue" in output.read_text()
    assert not (tmp_path / "packed.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    assert "holds an interrupted run: --resume continues it" in refused(*arguments)
    call(*arguments, "--resume")
    whole = whole_run(replace(SMALL, steps=200))
    assert torch.equal(load_file(tmp_path / "packed.safetensors")["embeddings"], whole.points)
    assert not folder.exists()
