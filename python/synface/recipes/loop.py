"""Steps with checkpoints that resume bitwise the same, for recipes that train several networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .. import checkpoint
from ..checkpoint.jsonl import Lines
from ..common.interrupts import interruption, interrupts

METRICS = "metrics.jsonl"


class Progress(Protocol):
    """What a recipe tells while it runs."""

    def start(self, total_steps: int, step: int) -> None: ...

    def advance(self, note: str) -> None: ...


def run_steps(
    folder: Path,
    description: dict[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: Callable[[int], dict[str, float]],
    total: int,
    *,
    resume: bool = False,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> list[dict[str, float]]:
    """Runs step(0), …, step(total − 1).

    What a step does must depend on its number, the modules and the optimizers alone: its draws on
    generators seeded with its number. Then a resumed run is bitwise one that was never interrupted.

    Args:
        folder: gets metrics.jsonl (what each step returned) and checkpoints/.
        description: "config" and "data", JSON; a checkpoint of others is not resumed from.
        modules, optimizers: what a checkpoint holds, by names without dots.
        resume: go on from the newest checkpoint in the folder, if there is one.
        progress: is told about every step.
        stop_after: end early, after this step, as an interruption would.

    Returns:
        The rows of all steps.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or of another configuration or data.
        FileExistsError: where the folder holds a run already and ``resume`` is not set.
        FloatingPointError: once a step returns a number that is not finite.
        KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, once the step is done and a
            checkpoint of it is written.
    """
    description = json.loads(json.dumps(description))
    model = nn.ModuleDict(modules)
    checkpoints, log = folder / "checkpoints", Lines(folder / METRICS)
    history: list[dict[str, float]] = []
    if checkpoint.checkpoints(checkpoints):
        if not resume:
            raise FileExistsError(
                f"{folder} holds a run already: resume it, or choose another output folder"
            )
        history = log.steps(_restore(folder, description, model, optimizers))
    folder.mkdir(parents=True, exist_ok=True)

    def save(done: int) -> None:
        # The log first: a checkpoint without its rows could not be resumed from.
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
            if done % checkpoint_every == 0 or done == total or stop:
                save(done)
            if stop:
                raise interruption(stop)
            if stop_after is not None and number >= stop_after:
                break
    return history


def _restore(
    folder: Path,
    description: dict[str, Any],
    modules: nn.ModuleDict,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> int:
    """Load the newest checkpoint; return how many steps it has done."""
    found = checkpoint.find(folder)
    state = checkpoint.load_state(found)
    for part in ("config", "data"):
        checkpoint.check_same(found, state.get(part), description[part], part)
    return checkpoint.load_model(found, modules, optimizers)["step"]
