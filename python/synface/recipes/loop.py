"""Training steps of recipes with several networks, with checkpoints that resume bitwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint.jsonl import Lines
from ..common.files import CheckpointError
from ..common.interrupts import interruption, interrupts
from ..training.config import TrainConfig

METRICS = "metrics.jsonl"
# Former keys of checkpoints and configurations, with their current names.
EARLIER = {"recogniser": "recognizer"}


class StageProgress(Protocol):
    """A progress bar of a recipe's part."""

    def start(self, total_steps: int, step: int) -> None: ...

    def advance(self, note: str) -> None: ...


class Stage(Protocol):
    """Configuration of a recipe's part."""

    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...


def run_steps(
    folder: Path,
    description: dict[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: Callable[[int], dict[str, float]],
    stage: Stage,
    *,
    resume: bool = False,
    progress: StageProgress | None = None,
    stop_after: int | None = None,
    added: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, float]]:
    """Run step(0), …, step(stage.steps − 1).

    A step must depend on its number, the modules and the optimizers alone, and draw from generators
    that are seeded with its number. Then a resumed run is bitwise equal to an uninterrupted one.

    Args:
        folder: folder of metrics.jsonl (the metrics that each step returned) and checkpoints/.
        description: "config" and "data", in JSON types; a checkpoint with others is rejected.
        modules, optimizers: the state of a checkpoint, by names without dots.
        stage: the number of steps, and of steps between checkpoints.
        resume: resume from the newest checkpoint in the folder, if there is one.
        progress: display that is updated after every step.
        stop_after: end early, after this step, as an interruption would.
        added: keys of tables of the configuration that earlier checkpoints lack, with the values
            that they stand for, by table.

    Returns:
        The metrics of all steps.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or of another configuration or data.
        FileExistsError: if the folder holds a run already and ``resume`` is not set.
        FloatingPointError: once a step returns a number that is not finite, or would store a
            parameter that is not.
        KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, once the step is done and a
            checkpoint of it is written.
    """
    description = json.loads(json.dumps(description))
    model = nn.ModuleDict(modules)
    checkpoints, log, total = folder / "checkpoints", Lines(folder / METRICS), stage.steps
    history: list[dict[str, float]] = []
    if checkpoint.checkpoints(checkpoints):
        if not resume:
            raise FileExistsError(
                f"{folder} holds a run already: resume it, or choose another output folder"
            )
        history = log.steps(_restore(folder, description, model, optimizers, added or {}))
    folder.mkdir(parents=True, exist_ok=True)

    def save(done: int) -> None:
        for name, value in model.state_dict().items():
            if not torch.isfinite(value).all():
                raise FloatingPointError(
                    f"{name} is not finite after step {done - 1} of {folder.name}: lower lr; "
                    f"earlier checkpoints are in {checkpoints}"
                )
        # Write the log first: a checkpoint without its rows cannot be resumed.
        log.rewrite(history)
        checkpoint.save_model(checkpoints, done, model, optimizers, description)

    if progress:
        progress.start(total, len(history))
    with interrupts() as interrupted:
        for number in range(len(history), total):
            row = {"step": number} | step(number)
            wrong = [name for name, value in row.items() if not math.isfinite(value)]
            if wrong:
                raise FloatingPointError(
                    f"{wrong[0]} is {row[wrong[0]]} at step {number} of {folder.name}: lower lr; "
                    f"earlier checkpoints are in {checkpoints}"
                )
            history.append(row)
            if progress:
                shown = [f"{k} {v:.3f}" for k, v in row.items() if k != "step"]
                progress.advance(", ".join(shown[:2]))
            done, stop = number + 1, interrupted()
            if done % stage.checkpoint_every == 0 or done == total or stop:
                save(done)
            if stop:
                raise interruption(stop)
            if stop_after is not None and number >= stop_after:
                break
    return history


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step of an optimizer along the gradient of a loss, and clear the gradients."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def set_cosine_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Set the learning rate of a step, which falls from ``lr`` to 0 along a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _restore(
    folder: Path,
    description: dict[str, Any],
    modules: nn.ModuleDict,
    optimizers: Mapping[str, torch.optim.Optimizer],
    added: Mapping[str, Mapping[str, Any]],
) -> int:
    """Load the newest checkpoint, and return the number of steps that it has done."""
    found = checkpoint.find(folder)
    state = checkpoint.load_state(found)
    try:
        state = _with_current_keys(state)
        config = _with_added_keys(state.get("config"), added)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found / checkpoint.STATE}: {error}") from error
    for part, stored in (("config", config), ("data", state.get("data"))):
        checkpoint.check_same(found, stored, description[part], part)
    return checkpoint.load_model(found, modules, optimizers)["step"]


def _with_current_keys(value: Any) -> Any:
    """Return a checkpoint's state with present keys; a training configuration with all of them."""
    if not isinstance(value, dict):
        return value
    value = {EARLIER.get(key, key): _with_current_keys(each) for key, each in value.items()}
    if "recognizer" in value:
        value["recognizer"] = current_training(value["recognizer"])
    return value


def _with_added_keys(value: Any, added: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a stored configuration whose tables have the keys that were added since then."""
    if not isinstance(value, dict):
        return value
    return {
        key: {**added.get(key, {}), **each} if isinstance(each, dict) else each
        for key, each in ((key, _with_added_keys(each, added)) for key, each in value.items())
    }


def current_training(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored training configuration, with the keys that were added since then.

    Raises:
        AttributeError, TypeError, ValueError: for a configuration that this version does not know.
    """
    return json.loads(json.dumps(asdict(TrainConfig.from_json(config))))
