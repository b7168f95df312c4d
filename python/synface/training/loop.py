"""The training loop: a backbone, a margin head, and checkpoints that resume bitwise.

It runs in one process, or on the ranks of a `torch.distributed` process group if one is
initialized: then each rank has its part of every batch and its share of the classes.

Every random number of a step comes from a generator seeded by (seed, purpose, step). So a
checkpoint holds no generator's state, and a resumed run draws the numbers of an uninterrupted one.

On a GPU no step waits for its own results: they are copied to the host behind the step, and read
once the next step is under way. float16's `GradScaler` alone waits, to skip steps that overflow.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import synface_kernels as sk

from .. import checkpoint
from ..checkpoint.jsonl import Lines
from ..common.check import check_device
from ..common.files import CheckpointError, write_text
from ..common.interrupts import interruption, interrupts
from ..common.rng import generator, seeded, seeds, standard_defaults
from ..common.toml import write_toml
from ..data import DataError
from ..data.formats.image_set import LabeledImages
from ..data.loading.sampler import WHOLE, RankSlice
from ..heads import MarginHead, ShardedMarginHead
from .backbone import with_backbone
from .config import TrainConfig
from .figures import Figures, deterministic
from .loggers import Logger, opened, under
from .model import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    TIMING,
    VERIFICATION,
    build_model,
    check_start,
    recorded,
    started_as,
)
from .model import load_backbone as load_backbone  # public here
from .schedule import learning_rate
from .selection import Selection
from .sources import Batch, FacesSource, Source

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the first one wins if ranks received different ones


class Progress(Protocol):
    """A progress display of a run; `train` calls it at the start and for each finished step."""

    def start(self, total_steps: int, step: int) -> None: ...

    def step(self, loss: float, accuracy: float, images: int) -> None: ...


@dataclass
class Trained:
    """A trained model.

    Attributes:
        backbone: in evaluation mode.
        head: on several ranks, this rank's share of the classes.
        config: the configuration that its checkpoints record.
        history: the log row of each step.
        timing: the loader's timing; None if no files are read.
        init: a sentence on what was loaded from another run, if any.
        best: a sentence on the best verification, if one was selected.
    """

    backbone: nn.Module
    head: MarginHead | ShardedMarginHead
    config: TrainConfig
    history: list[dict[str, float]]
    timing: dict[str, float] | None
    init: str | None = None
    best: str | None = None


def train(
    config: TrainConfig,
    data: LabeledImages | Source,
    output: Path,
    *,
    backbone: nn.Module | None = None,
    resume: bool = False,
    prolong: bool = False,
    init: Path | None = None,
    init_head: str = "auto",
    progress: Progress | None = None,
    stop_after: int | None = None,
    command: dict[str, Any] | None = None,
    verify: Callable[[nn.Module], Mapping[str, float]] | None = None,
    verify_every: float = 0,
    best: str | None = None,
    patience: int = 0,
    loggers: Sequence[str | Logger] = (),
    tensorboard: bool = False,
    device: torch.device | str = "cpu",
) -> Trained:
    """Train a backbone and a margin head on a set of faces or another source.

    Where a `torch.distributed` process group is initialized, all of its ranks call this with the
    same arguments: each trains on its part of every batch, in a `DistributedDataParallel` backbone,
    and holds its share of the classes. They share one ``output``, to which the first rank writes.
    Checkpoints are then written by all ranks, and any number of ranks can resume them.

    Args:
        config: the configuration of the run.
        data: `Faces`, an `ImageSet`, whose images are decoded on demand, or a `Source`; at least
            two identities.
        output: the run's folder: config.json, config.toml (the same, for ``synface train
            --config``), metrics.jsonl (one line per step), checkpoints/, and for a source that
            reads files timing.jsonl (one line per start).
        backbone: the module to train, (B, C, H, W) images to (B, ``config.embedding_size``)
            embeddings, instead of the one that ``config`` names. Checkpoints hold its parameters
            and not its code: resume with ``backbone`` too, and give it to `load_backbone`.
        resume: resume from the newest checkpoint in ``output``. The result is bitwise that of an
            uninterrupted run. The data may have moved; their fingerprint must be the same.
        prolong: with resume, ``config`` may have more epochs than the run had. From the checkpoint
            on, the learning rate is that of the longer schedule at the same step.
        init: a run (or one of its checkpoints) whose backbone a new run begins with, or a file of
            its weights: .safetensors, or a torch file of a state dict, also by insightface's names.
            Optimizer, schedule and log start again; ``Trained.init`` names what was loaded.
        init_head: what becomes of the class centers of ``init``: "auto" keeps them where the data
            have as many identities, which must then be in the same order; "keep" raises otherwise;
            "resize" keeps the first ones, for data with identities added or removed at the end;
            "new" keeps none.
        progress: a display that is called at every step.
        stop_after: end early, after this step, as an interruption would (only the last checkpoint
            remains).
        command: further content of config.json: how the run was started.
        verify: called with the backbone, in evaluation mode, at the end and after every
            ``verify_every`` epochs (0: only at the end); the metrics that it returns are appended
            to verification.jsonl.
        best: the metric, more of which is better, whose best verification keeps its checkpoint in
            ``output``/best, besides the two newest ones.
        patience: number of verifications without a higher ``best`` after which the run ends early;
            0: never.
        loggers: where loss, accuracy, learning rate and verification are logged too: "tensorboard"
            (in ``output``/tensorboard), "wandb", "mlflow", which need their packages, or a
            `Logger`. A resumed run continues its log there.
        tensorboard: the same as "tensorboard" among the loggers.
        device: this rank's device.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or of another configuration or data, and
            for an ``init`` whose network has other shapes.
        ValueError: for unsuitable data, a network that cannot be built, and a ``best`` that is no
            metric of the verification, after the first one.
        FileExistsError: if ``output`` holds a run already and ``resume`` is not set.
        OSError: if ``output`` cannot be written to.
        DataError: if the source fails (a damaged file, a worker that died); in one process a
            checkpoint of the last step is written first, on several ranks the previous one remains.
        FloatingPointError: once a loss or a parameter is not finite, on a GPU a step later; the
            last checkpoint remains.
        KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, once the step is done and a
            checkpoint of it is written; on any rank, all ranks end after the same step.

    Torch's global random state is not changed. On a GPU, cuDNN is restricted to deterministic
    algorithms meanwhile.

    Memory: the network and its activations, and the centers with their gradient and optimizer state
    (`synface plan` estimates it), and the images of `Faces` or a few batches of an `ImageSet`.
    """
    if not 0 <= verify_every < math.inf:
        raise ValueError(f"verify_every must be 0 or more epochs, got {verify_every}")
    if verify is None and (best is not None or verify_every):
        raise ValueError(
            f"best and verify_every need verify, which measures a network, got {best!r} and "
            f"{verify_every} without it"
        )
    source: Source = FacesSource(data) if isinstance(data, LabeledImages) else data
    if source.num_classes < 2:
        raise ValueError(f"training needs two identities or more, got {source.num_classes}")
    height, width, channels = source.image_shape
    config = with_backbone(config, backbone)
    loggers = (*loggers, "tensorboard") if tensorboard else loggers
    check_start(
        config,
        (height, width),
        output,
        channels=channels,
        resume=resume,
        init=init,
        init_head=init_head,
        loggers=loggers,
    )
    run = _Training(config, source, output, check_device(device), backbone)
    run.selection = Selection(best, patience)
    with ExitStack() as stack:
        interrupted = stack.enter_context(interrupts())
        if resume:
            first = run.resume(command, prolong)
        else:
            first = run.start(command or {}, init, init_head)
        stack.enter_context(deterministic(run.device))
        used = opened(loggers if run.leads else (), output, first, config.to_json())
        log = stack.enter_context(used)
        if progress:
            progress.start(run.total_steps, first)

        def report(step: int, row: dict[str, float]) -> None:
            log(step, under("training", row))
            if progress:
                progress.step(row["loss"], row["accuracy"], run.batch_size(step))

        run.report = report
        if run.leads:
            stack.callback(_append_timing, source, output / TIMING, first)  # however it ends
        batches = stack.enter_context(closing(source.batches(config, first, run.part, run.device)))
        steps = _saved_on_error(batches, first, run.save if run.alone else None)
        for step, batch in () if run.selection.ended else steps:
            stop = run.step(step, batch, interrupted)
            done = step + 1
            stop, last = stop or (interrupted() if run.alone else 0), done == run.total_steps
            if verify and (last or (verify_every and run.ended(verify_every, done))):
                row = run.verify(done, verify)
                log(step, under("verification", row))
                if run.selects(done) and run.selection.add(row):
                    run.save(done, run.best)
                last = last or run.selection.ended
            if run.ended(config.checkpoint_every, done) or last or stop:
                run.save(done)
            if stop:
                raise interruption(stop)
            if last:
                break
            if stop_after is not None and step >= stop_after:
                break
        run.finish()
        if stop := run.stopped(interrupted)[0]:  # received while the last checkpoint was written
            raise interruption(stop)
    run.backbone.eval()
    timing = source.timing.report() if source.timing else None
    summary = run.selection.summary()
    return Trained(run.backbone, run.head, config, run.history, timing, run.init, summary)


class _Training:
    """The state of a run: its model, its folder, its log."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        output: Path,
        device: torch.device,
        backbone: nn.Module | None,
    ) -> None:
        self.config, self.output, self.device = config, output, device
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.part = WHOLE if self.alone else RankSlice(dist.get_rank(), dist.get_world_size())
        self.leads = self.part.rank == 0
        self.folder, self.best = output / CHECKPOINTS, output / BEST
        self.description = {"config": config.to_json(), "data": source.description()}
        self.images, self.num_classes = len(source), source.num_classes
        self.steps_per_epoch = -(-self.images // config.batch_size)
        ranks, least = self.part.ranks, self.batch_size(self.steps_per_epoch - 1)
        if least < ranks:
            raise ValueError(
                f"each of {ranks} ranks needs an image of every batch: an epoch's last one has "
                f"{least} of {self.images}; choose another batch_size, got {config.batch_size}"
            )
        self.model = build_model(config, source, self.alone, device, backbone)
        self.backbone, self.head = self.model.backbone, self.model.head
        self.network: nn.Module = self.backbone
        if not self.alone:
            devices = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(self.backbone, device_ids=devices)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.history: list[dict[str, float]] = []
        self.report: Callable[[int, dict[str, float]], None] = lambda step, row: None
        # Steps whose figures may still be on their way: (step, learning rate, figures).
        self._unread: list[tuple[int, float, Figures]] = []
        self.delay = 1 if device.type == "cuda" else 0  # steps until figures are read
        self.init: str | None = None
        self.lines = Lines(output / METRICS)
        self.verified = Lines(output / VERIFICATION)
        self.selection = Selection(None)
        self.frozen = False  # whether the backbone is, at this step
        self._train_mode()

    def start(self, command: dict[str, Any], init: Path | None, init_head: str) -> int:
        """Write a new run's files, and return its first step, 0."""
        if init is not None:
            self.init = self.model.begin_with(init, self.num_classes, init_head)
            command = command | {"init": str(init.absolute())}
            command |= {"init_head": init_head} if init_head != "auto" else {}
        self._barrier()  # all ranks have checked the folder
        if self.leads:
            self.output.mkdir(parents=True, exist_ok=True)
            self._write(command, None)
            self.lines.rewrite([])
        self.save(0)  # so that there is always one to resume from
        return 0

    def _write(self, command: dict[str, Any], before: dict[str, Any] | None) -> None:
        """Write config.json and config.toml, unless they are the same already."""
        started = json.loads(json.dumps({"command": command} | self.description))
        if started != before:
            write_text(self.output / CONFIG, json.dumps(started, indent=1))
            write_toml(self.output / "config.toml", started["command"] | started["config"])

    def resume(self, command: dict[str, Any] | None, prolong: bool) -> int:
        """Load the newest checkpoint, and return the next step."""
        found = checkpoint.find(self.output)
        first = self.model.load(found, lambda state: self._check(found, state, prolong))
        # Steps after the checkpoint are repeated, and their log lines rewritten.
        self.history, before = self.lines.steps(first), started_as(self.output)
        self._barrier()  # all ranks have read them
        if self.leads:
            self._write((before or {}).get("command", {}) if command is None else command, before)
            self.lines.rewrite(self.history)
        self._resume_verification(first)
        return first

    def _resume_verification(self, first: int) -> None:
        """Forget the verifications of steps that the run repeats, and their checkpoints."""
        rows = self.verified.read() if self.verified.file.exists() else []
        kept = {checkpoint.step_of(each): each for each in checkpoint.checkpoints(self.best)}
        self._barrier()  # all ranks have read them
        rows = [row for row in rows if row["step"] <= first]
        self.selection.resume(rows, [step for step in kept if step <= first])
        if not self.leads:
            return
        if self.verified.file.exists():
            self.verified.rewrite(rows)
        for step, each in kept.items():
            if step > first:
                shutil.rmtree(each)

    def selects(self, steps: int) -> bool:
        """Return whether a verification after so many steps may be the best one.

        While the backbone is frozen, it is that of the start.
        """
        return steps > round(self.config.freeze * self.steps_per_epoch)

    def _check(self, found: Path, state: dict[str, Any], prolong: bool) -> None:
        """Raise CheckpointError for a checkpoint of another run."""
        came, wanted = asdict(recorded(found, state)), asdict(self.config)
        if prolong and came["epochs"] < wanted["epochs"]:
            wanted["epochs"] = came["epochs"]
        checkpoint.check_same(found, came, wanted, "config")
        came, wanted = state["data"], dict(self.description["data"])
        if came.get("fingerprint") != wanted["fingerprint"]:
            raise CheckpointError(
                f"{found} is of another run: its data's fingerprint is not that of "
                f"{wanted['source']}; give the images that it was trained on, from their present "
                f"path (formerly {came.get('source')})"
            )
        del wanted["source"]  # the images may have moved
        checkpoint.check_same(found, came, wanted, "data")

    def save(self, steps: int, folder: Path | None = None) -> None:
        """Write a checkpoint after the given number of steps, and flush the log to the disk."""
        self.finish()
        if self.leads:
            self.lines.flush()
        if not self.alone:  # any rank may write them; the next forward pass would do this too
            for buffer in self.backbone.buffers():
                dist.broadcast(buffer, 0)
        parameters = list(self.model.modules.named_parameters())
        finite = torch.stack([parameter.isfinite().all() for _, parameter in parameters]).cpu()
        if any(self.total(float(not finite.all()))):
            wrong = [name for (name, _), fine in zip(parameters, finite, strict=True) if not fine]
            raise FloatingPointError(
                f"{wrong[0] if wrong else 'a parameter of another rank'} is not finite after "
                f"{steps} steps: lower lr (now {self.config.lr:g}); earlier checkpoints are in "
                f"{self.folder}"
            )
        self.model.save(folder or self.folder, steps, self.description)

    def batch_size(self, step: int) -> int:
        """Return the number of images of a step, on all ranks together."""
        done = step % self.steps_per_epoch * self.config.batch_size
        return min(self.config.batch_size, self.images - done)

    def ended(self, epochs: float, steps: int) -> bool:
        """Return whether a number of steps completes a multiple of these epochs."""
        return steps % max(1, round(epochs * self.steps_per_epoch)) == 0

    def total(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over the ranks."""
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if not self.alone:
            dist.all_reduce(own)
        return own.tolist()

    def stopped(self, interrupted: Callable[[], int], *numbers: float) -> list[Any]:
        """Return the signal that any rank received, or 0; then sums of numbers over the ranks."""
        came = interrupted()
        ended = (float(came == each) for each in SIGNALS)
        term, interrupt, *sums = self.total(*ended, *numbers)
        return [SIGNALS[0] if term else SIGNALS[1] if interrupt else 0, *sums]

    def _barrier(self) -> None:
        if not self.alone:
            dist.barrier()

    def step(self, step: int, batch: Batch, interrupted: Callable[[], int]) -> int:
        """Train on a batch; return any rank's signal, or 0.

        The step's log row is finished at once on a CPU, and on a GPU by the next step, or `finish`.
        """
        config, optimizers, scaler = self.config, self.model.optimizers, self.model.scaler
        rate = learning_rate(config, step, self.steps_per_epoch)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        frozen = step < round(config.freeze * self.steps_per_epoch)
        if frozen != self.frozen:
            self.frozen = frozen
            self._train_mode()
        images, target, weight = (
            None if value is None else value.to(self.device, non_blocking=True) for value in batch
        )
        assert images is not None
        assert target is not None
        class_ids = None
        if config.sample_rate < 1:
            class_ids, target = self._sampled(step, target)
        count = self.batch_size(step)
        parts = min(config.accumulate, count // self.part.ranks)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        hits = torch.zeros((), dtype=torch.float32, device=self.device)
        seed = seeds(config.seed, self.part.purpose("dropout"), step)
        with seeded(seed, self.device):
            for i in range(parts):
                rows = RankSlice(i, parts).of(len(images))
                last = i + 1 == parts  # only then are gradients reduced over the ranks
                with nullcontext() if self.alone or last else self.network.no_sync():  # type: ignore[operator]
                    embeddings = self._embed(images[rows])
                    with self._autocast():
                        part_loss, stats = self.head(
                            embeddings,
                            target[rows],
                            None if weight is None else weight[rows],
                            class_ids=class_ids,
                            reduction="sum",
                            return_stats=True,
                        )
                    part_loss = part_loss / count
                    loss += part_loss.detach()
                    hits += stats.top1.sum()
                    # A GPU's step is taken blindly: its figures are checked by the next one.
                    if self.delay or part_loss.isfinite():
                        part_loss.backward()
        numbers = {"loss": loss, "hits": hits}
        if self.delay or loss.isfinite():
            if config.clip_norm > 0 and not frozen:
                scaler.unscale_(optimizers["optimizer"])
                parameters = self.backbone.parameters()
                numbers["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            with standard_defaults():  # the optimizers create their counters
                if not frozen:
                    scaler.step(optimizers["optimizer"])
                    scaler.update()
                optimizers["centers"].step()
        self._unread.append((step, rate, Figures(**numbers)))
        if len(self._unread) <= self.delay:
            return self.stopped(interrupted)[0]
        return self._log(interrupted)

    def finish(self) -> None:
        """Log the steps whose figures are not read yet."""
        while self._unread:
            self._log(lambda: 0)

    def _log(self, interrupted: Callable[[], int]) -> int:
        """Log the first step whose figures are not read yet; return any rank's signal, or 0."""
        step, rate, figures = self._unread.pop(0)
        numbers = figures.read()
        stop, right = self.stopped(interrupted, numbers["hits"])
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": numbers["loss"],
            "accuracy": right / self.batch_size(step),
            "lr": rate,
        }
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {step}: lower lr (now {self.config.lr:g}); "
                f"earlier checkpoints are in {self.folder}"
            )
        norm = numbers.get("gradient_norm", math.nan)
        if math.isfinite(norm):  # else the scaler has skipped this step
            row["gradient_norm"] = norm
        self.history.append(row)
        if self.leads:
            self.lines.append(row)
        self.report(step, row)
        return stop

    def _sampled(self, step: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sampled classes of a step, and the target as indices into them."""
        seed, head = self.config.seed, self.head
        drawn = generator(seed, self.part.purpose("classes"), step)
        classes = head.weight.shape[0]
        wanted = math.ceil(self.config.sample_rate * classes)
        if isinstance(head, ShardedMarginHead):
            return sk.sample_classes(
                target, classes, wanted, drawn, group=head.group, class_start=head.class_start
            )
        return sk.sample_classes(target, classes, wanted, drawn)

    def verify(
        self, steps: int, verify: Callable[[nn.Module], Mapping[str, float]]
    ) -> dict[str, float]:
        """Verify the backbone on the first rank, and return the row of its metrics on all."""
        row: dict[str, float] = {}
        self.finish()
        if self.leads:
            self.backbone.eval()
            figures = dict(verify(self.backbone))
            self._train_mode()
            row = {"step": steps, "epoch": steps / self.steps_per_epoch} | figures
            self.verified.append(row)
        if not self.alone:
            rows = [row]
            dist.broadcast_object_list(rows, 0, device=torch.device("cpu"))
            row = rows[0]
        return row

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _embed(self, images: Tensor) -> Tensor:
        network = self.backbone if self.frozen else self.network
        with self._autocast(), torch.set_grad_enabled(not self.frozen):
            embeddings: Tensor = network(images)
        if self.config.precision != "bfloat16" or embeddings.dtype != torch.bfloat16:
            embeddings = embeddings.float()  # float16 gradients are rounded after they are scaled
        if self.model.scaler.is_enabled() and not self.frozen:
            embeddings.register_hook(self.model.scaler.scale)
        return embeddings

    def _train_mode(self) -> None:
        self.model.modules.train()
        self.backbone.train(not self.frozen)
        if self.config.freeze_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def _saved_on_error(
    batches: Iterator[tuple[int, Batch]], first: int, save: Callable[[int], None] | None
) -> Iterator[tuple[int, Batch]]:
    """Yield the batches; if reading fails, first save the completed steps.

    On several ranks ``save`` is None, since one rank cannot save alone.
    """
    done = first
    try:
        for step, batch in batches:
            yield step, batch
            done = step + 1
    except DataError:
        if save is not None and done > first:
            save(done)
        raise


def _append_timing(source: Source, file: Path, first: int) -> None:
    if source.timing is not None:
        with file.open("a") as lines:
            lines.write(json.dumps({"first_step": first} | source.timing.report()) + "\n")
