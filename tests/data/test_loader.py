"""The two-domain loader: reproducible batches, and errors for dead workers and damaged files."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from synface.common.rng import generator
from synface.data import (
    CycledOrder,
    DataError,
    Faces,
    ImageSet,
    TwoDomainLoader,
    embedded_faces,
    list_folder,
    read_folder,
)
from synface.data.formats.images import Files, PackedPaths
from synface.data.loading.loader import WorkerDied
from synface.data.loading.worker import IDLE
from synface.data.mixing import Beta, DomainMixup

from tests.helpers.forked import forked
from tests.helpers.images import folder, truncate
from tests.helpers.processes import is_running, wait_for, within

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def batches(*arguments, **options) -> list[tuple]:
    """Return all that a loader yields, copied."""
    with TwoDomainLoader(*arguments, **options) as loader:
        return [(step, *(part.clone() for part in batch)) for step, batch in loader]


def assert_same(a: list[tuple], b: list[tuple]) -> None:
    assert [x[0] for x in a] == [x[0] for x in b]
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(x[1:], y[1:], strict=True))


# -- what is yielded


def test_batches_are_the_images_of_the_order(synthetic, real):
    got = batches(synthetic, real, 5, size=(16, 14), seed=3, last_step=6)
    sets = [read_folder(path, (16, 14)) for path in (synthetic, real)]
    order = CycledOrder(12, 6, seed=3)
    assert [step for step, *_ in got] == list(range(6))
    assert [len(labels) for _, _, labels, _, _ in got] == [5, 5, 2] * 2
    for step, *batch in got:
        epoch, begin = step // 3, step % 3 * 5
        rows = order(epoch, np.arange(begin, min(begin + 5, 12)))
        for side, (faces, indices) in enumerate(zip(sets, rows, strict=True)):
            assert torch.equal(batch[2 * side], faces.images[indices])
            assert torch.equal(batch[2 * side + 1], faces.labels[indices])


def test_any_number_of_workers_yields_the_same_from_any_step(synthetic, real):
    whole = batches(synthetic, real, 5, last_step=9, workers=1, prefetch=1)
    for first, workers, prefetch in ((0, 3, 2), (4, 2, 3), (8, 1, 2)):
        options = {"first_step": first, "workers": workers, "prefetch": prefetch}
        assert_same(whole[first:], batches(synthetic, real, 5, last_step=9, **options))
    other = batches(synthetic, real, 5, last_step=9, seed=1)
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(whole, other, strict=True))


def test_a_domain_may_be_in_memory(synthetic, real):
    on_disk = batches(synthetic, real, 5, size=(16, 14), last_step=3)
    sets = [read_folder(path, (16, 14)) for path in (synthetic, real)]
    assert_same(on_disk, batches(sets[0], real, 5, last_step=3))  # its size holds for both
    assert_same(on_disk, batches(synthetic, sets[1], 5, last_step=3))
    assert_same(on_disk, batches(*sets, 5, last_step=3))


def test_size_and_color_are_found_out(synthetic, real, tmp_path):
    colored = folder(tmp_path / "colored", 2, 2, seed=3, mode="RGB")
    with TwoDomainLoader(synthetic, real, 4) as loader:
        assert loader.image_shape == (20, 18, 1)  # the first synthetic image's
    with TwoDomainLoader(synthetic, colored, 4) as loader:
        assert loader.image_shape == (20, 18, 3)
    with TwoDomainLoader(synthetic, colored, 4, grayscale=True, size=(8, 9)) as loader:
        assert loader.image_shape == (8, 9, 1)
        _, pairs = next(loader)
        assert pairs.real.shape == (4, 8, 9, 1)


@pytest.mark.parametrize("per_sample", [False, True])
def test_workers_mix_to_the_same_bits(synthetic, real, per_sample):
    mixup = DomainMixup(4, 3, ratio=Beta(0.5), per_sample=per_sample, flip=0.5, std=0.25)
    options = {"size": (16, 14), "seed": 7, "last_step": 6}
    mixed = batches(synthetic, real, 5, mix_in_workers=mixup, **options)
    for (step, *pairs), (_, images, targets, weights) in zip(
        batches(synthetic, real, 5, **options), mixed, strict=True
    ):
        expected = mixup(*pairs, generator=generator(7, "mixup", step))
        assert images.shape == (len(pairs[0]), 1, 16, 14)
        assert torch.equal(images, expected.images)
        assert torch.equal(targets, expected.targets)
        assert torch.equal(weights, expected.weights)


def test_timing_adds_up(synthetic, real):
    with TwoDomainLoader(synthetic, real, 5, size=(200, 200), last_step=9) as loader:
        assert sum(len(pairs.real) for _, pairs in loader) == 36
        report = loader.timing.report()
    assert report["samples"] == 36
    assert report["samples_per_s"] == pytest.approx(36 / report["seconds"])
    assert 0 < report["decode_share"] < 1
    assert report["decode_share"] * 2 * report["seconds"] == pytest.approx(report["decoding"])
    assert 0 < report["wait_share"] <= 1


def test_the_documented_loop_runs():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (block,) = [block for block in blocks if "TwoDomainLoader" in block]
    names: dict = {}
    exec(compile(block, "training.md", "exec"), names)
    assert names["images"].shape == (16, 1, 48, 48)
    assert names["targets"].shape == names["weights"].shape == (16, 2)


# -- workers


def test_workers_do_without_torch(synthetic, real):
    """Workers do not import torch, even where they mix, with the kernels' NumPy binding."""
    mixup = DomainMixup(4, 3)
    with TwoDomainLoader(synthetic, real, 5, mix_in_workers=mixup) as loader:
        for _ in range(4):
            next(loader)
        mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in loader.pids]
    assert all("_multiarray_umath" in text for text in mapped)  # NumPy, as a check of the check
    assert any("synface_kernels/_numpy" in text for text in mapped)
    assert not any("torch" in text for text in mapped)


def test_the_current_folder_is_not_imported_from(synthetic, real, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with TwoDomainLoader(synthetic, real, 5) as loader:
        next(loader)


def stop_on_an_image(loader: TwoDomainLoader, worker: int) -> int:
    """Stop a worker while it is on an image, and return its ticket."""
    pid = loader.pids[worker]
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: status.read_text().rsplit(")", 1)[1].split()[0] == "T")
        ticket = int(loader._tickets.array[worker])
        if ticket >= 0:
            return ticket
        os.kill(pid, signal.SIGCONT)
        next(loader)  # it may have been ahead: a free slot gives it work
    raise AssertionError("never on an image")


@pytest.mark.parametrize("domain", ["files", "memory"])
def test_a_killed_worker_is_named_with_the_file_that_it_was_on(synthetic, real, domain):
    sets = (synthetic, real)
    if domain == "memory":
        sets = tuple(read_folder(path, (900, 900)) for path in sets)
    with TwoDomainLoader(*sets, 5, size=(900, 900), prefetch=4) as loader:
        next(loader)
        ticket = stop_on_an_image(loader, 1)
        step, place = divmod(ticket, 10)
        side, i = divmod(place, 5)
        row = loader._rows(step)[side, i]
        path = (synthetic, real)[side]
        name = f"image {row} of {path}" if domain == "memory" else list_folder(path).name(row)
        pid = loader.pids[1]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied) as raised, within(60):
            for _ in loader:
                pass
        assert str(raised.value) == (
            f"loader worker 2 of 2 (process {pid}) was killed by signal 9 (Killed) "
            f"while on {name}; the system does this when memory runs out"
        )
        with pytest.raises(ValueError, match="the loader is closed"):
            next(loader)


def test_a_death_is_told_within_a_second_of_waiting(synthetic, real):
    died = []

    def kill():
        died.append(time.monotonic())
        # Ctrl-C and SIGTERM are the trainer's to take; under nohup, SIGHUP is ignored.
        os.kill(pid, signal.SIGUSR1)

    with TwoDomainLoader(synthetic, real, 5, workers=1) as loader:
        pid = loader.pids[0]
        next(loader)
        stop_on_an_image(loader, 0)  # so that what is asked for now never comes
        threading.Timer(0.3, kill).start()
        threading.Timer(0.4, os.kill, (pid, signal.SIGCONT)).start()
        told = r"signal 10 \(User defined signal 1\) while on"
        with pytest.raises(WorkerDied, match=told), within(60):
            for _ in loader:
                pass
        assert time.monotonic() - died[0] < 1.1  # the signal is seen 0.1 s later


def test_a_death_is_told_even_where_the_batch_is_there(synthetic, real):
    with TwoDomainLoader(synthetic, real, 5, last_step=3) as loader:
        next(loader)
        wait_for(lambda: (loader._tickets.array == IDLE).all())
        os.kill(loader.pids[0], signal.SIGKILL)
        wait_for(lambda: loader._resources.workers[0].process.poll() is not None)
        with pytest.raises(DataError, match=r"worker 1 of 2 .* killed by signal 9 .* while idle"):
            next(loader)


def test_a_worker_that_cannot_start_is_told_of(synthetic, real, monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", [])
    with (
        pytest.raises(WorkerDied, match="exited with status 1 while it started"),
        TwoDomainLoader(synthetic, real, 5) as loader,
    ):
        next(loader)
    assert "ModuleNotFoundError" in capfd.readouterr().err


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("how", ["close", "forget"])
def test_nothing_is_left_behind(synthetic, real, how):
    gc.collect()
    before = open_files(), sorted(os.listdir("/dev/shm"))
    loader = TwoDomainLoader(synthetic, real, 5)
    pids = loader.pids
    _, pairs = next(loader)
    copy = pairs.real.clone()
    assert open_files() > before[0]
    if how == "close":
        loader.close()
        loader.close()
    else:
        del loader
        gc.collect()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]  # not even as zombies
    assert torch.equal(pairs.real, copy)  # what was handed out is still there
    del pairs
    assert (open_files(), sorted(os.listdir("/dev/shm"))) == before


def test_a_fork_of_the_trainer_ends_no_worker(synthetic, real):
    with TwoDomainLoader(synthetic, real, 5) as loader:
        child = os.fork()
        if child == 0:
            loader.close()
            os._exit(0)
        os.waitpid(child, 0)
        for _ in range(9):
            next(loader)


def test_an_interrupt_while_waiting_closes_the_loader(synthetic, real):
    with TwoDomainLoader(synthetic, real, 5, workers=1) as loader:
        next(loader)
        stop_on_an_image(loader, 0)
        # A shell's background jobs ignore it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            with pytest.raises(KeyboardInterrupt), within(60):
                for _ in loader:
                    pass
        finally:
            signal.signal(signal.SIGINT, before)
        assert not Path(f"/proc/{loader.pids[0]}").exists()
        with pytest.raises(ValueError, match="the loader is closed"):
            next(loader)


def load_and_wait(*domains):
    loader = TwoDomainLoader(*domains, 5)
    next(loader)
    print(*loader.pids, flush=True)
    time.sleep(100)


def test_workers_end_with_the_trainer(synthetic, real, tmp_path):
    shown = tmp_path / "shown"
    with forked(shown, load_and_wait, synthetic, real) as trainer:
        wait_for(lambda: shown.exists() and shown.read_text().endswith("\n"), 120)
        pids = shown.read_text().split()
        assert len(pids) == 2
        trainer.kill()
        wait_for(lambda: not any(is_running(pid) for pid in pids))


class Copy:
    """Copies to a GPU that end when they are waited for, or at once."""

    def __init__(self, done: bool) -> None:
        self.done, self.waited = done, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done, self.waited = True, self.waited + 1


def test_a_slot_is_kept_until_the_copies_out_of_it_are_done(synthetic, real):
    options = {"size": (16, 14), "workers": 2, "prefetch": 1}  # three slots
    with TwoDomainLoader(synthetic, real, 5, **options) as loader:
        held: list[tuple[Copy, torch.Tensor, torch.Tensor]] = []
        for step in range(9):
            images = next(loader)[1].synthetic
            copy = Copy(done=step >= 5)
            loader.hold(copy)
            held.append((copy, images, images.clone()))
            time.sleep(0.05)  # workers write to what they may
            assert all(torch.equal(now, then) for copy, now, then in held if not copy.done)
        # Waited for only where no other slot was left.
        assert [copy.waited for copy, *_ in held[:6]] == [1, 1, 1, 1, 1, 0]
    assert held[-1][0].waited == 1  # before its memory was released


def test_slots_are_page_locked_where_cuda_is(synthetic, real, monkeypatch):
    locked: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        locked[address] = size
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with TwoDomainLoader(synthetic, real, 5, size=(16, 14)) as loader:
        _, pairs = next(loader)
        ((address, size),) = locked.items()
        assert address <= pairs.real.data_ptr() < address + size
        assert size == 5 * 2 * 5 * 16 * 14  # 2 workers with 2 slots, and one more
    assert not locked
    runtime.cudaHostRegister = lambda *_: 2
    with (
        pytest.warns(UserWarning, match=r"2,240 bytes of slots cannot be page-locked \(2\)"),
        TwoDomainLoader(synthetic, real, 1, size=(16, 14)) as loader,
    ):
        next(loader)


# -- what is refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (lambda file: file.write_bytes(b"MZ no image"), "not a readable image"),
        (Path.unlink, "not a regular file, or a broken link"),
        (lambda file: file.write_bytes(b"P5 60000 60000 255\n"), "bomb|over the limit"),
    ],
)
def test_a_damaged_file_is_named_when_its_batch_is_due(synthetic, real, damage, message):
    options = {"size": (20, 18), "grayscale": True}
    whole = batches(synthetic, real, 5, last_step=1, **options)
    files = list_folder(synthetic)
    file = files.store.path(CycledOrder(12, 6)(0, 7)[0])  # of the second batch
    damage(file)
    with TwoDomainLoader(files, real, 5, **options) as loader:
        step, pairs = next(loader)
        assert_same([(step, *pairs)], whole)
        with pytest.raises(DataError, match=f"(?s){file} cannot be used; .*({message})"):
            next(loader)


def test_a_first_file_that_tells_no_size_is_named(synthetic, real):
    truncate(synthetic / "p0" / "0.png")
    with pytest.raises(DataError, match=r"p0/0.png: .*truncated"):
        TwoDomainLoader(synthetic, real, 5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(2, np.int64), r"int64 of shape \(3,\), one for each image, got int64 \(2,\)"),
        (np.zeros(3, np.int32), r"int64 of shape \(3,\).* got int32 \(3,\)"),
        (np.array([0, 1, 2]), r"labels must lie in \[0, 2\), got 0 to 2"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(
            Files(PackedPaths.of([Path("a"), Path("b"), Path("c")])), labels, ["x", "y"], "here"
        )


def test_settings_that_make_no_sense(synthetic, real):
    small, big = embedded_faces(2, 16, identities=3), embedded_faces(2, 20, identities=3)
    empty = Faces(small.images[:0], small.labels[:0], [], "nowhere")
    fewer = {"mix_in_workers": DomainMixup(4, 2)}
    bfloat = {"mix_in_workers": DomainMixup(4, 3, dtype=torch.bfloat16)}
    before = open_files()
    for sets, options, message in (
        ((synthetic, real), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((synthetic, real), {"workers": 0}, "workers must be at least 1, got 0"),
        ((synthetic, real), {"prefetch": 0}, "prefetch must be at least 1, got 0"),
        ((synthetic, real), {"first_step": -1}, "first_step must be at least 0, got -1"),
        ((synthetic, real), {"size": (0, 3)}, "size must be .* got \\(0, 3\\)"),
        ((synthetic, real), fewer, "4 synthetic and 2 real identities, .* hold 4 and 3"),
        ((synthetic, real), bfloat, "contiguous float32 .* got dtype torch.bfloat16"),
        ((small, big), {}, r"one shape .* expected \(16, 16, 1\), got \(20, 20, 1\) from scikit"),
        ((small, real), {"size": (8, 8)}, r"expected \(8, 8, 1\), got \(16, 16, 1\)"),
        ((small, real), {"grayscale": False}, r"expected \(16, 16, 3\), got \(16, 16, 1\)"),
        ((small, empty), {}, r"real holds no images \(nowhere\)"),
        ((synthetic, real / "p0"), {}, "holds 0 identity folders"),
        ((synthetic, real / "missing"), {}, "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            TwoDomainLoader(*sets, **{"batch_size": 5} | options)
    assert open_files() == before
