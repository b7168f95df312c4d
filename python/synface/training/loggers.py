"""Loggers of a run's metrics: TensorBoard, Weights & Biases, MLflow, or one's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..common.extras import extra
from ..common.files import CheckpointError, write_text
from ..common.textfiles import read_json

IDS = "loggers.json"  # a run's identifiers at its loggers, so that a resumed run continues there


class Logger(Protocol):
    """A destination of a run's metrics, named as "training/loss" or "verification/auc"."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a finished step."""
        ...

    def close(self, error: BaseException | None) -> None:
        """Finish; called however the run ends, with the error or interruption that ended it."""
        ...


class TensorBoard:
    """A logger to ``output``/tensorboard."""

    def __init__(self, output: Path, first: int, config: Mapping[str, Any], known: str | None):
        with extra("tensorboard", "the log for TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

        self.id = None
        # Steps from the first on, which the run repeats, are purged.
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, error: BaseException | None) -> None:
        self._writer.close()


class WandB:
    """A logger to Weights & Biases, in the mode that its environment variables set."""

    def __init__(self, output: Path, first: int, config: Mapping[str, Any], known: str | None):
        with extra("wandb", "the log for Weights & Biases"):
            import wandb

        self._run = wandb.init(
            dir=str(output), name=output.name, id=known, resume="allow", config=dict(config)
        )
        self.id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


class MLflow:
    """A logger to MLflow, at the tracking URI that its environment variables set."""

    def __init__(self, output: Path, first: int, config: Mapping[str, Any], known: str | None):
        with extra("mlflow", "the log for MLflow"):
            import mlflow

        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=known, run_name=output.name).info.run_id
        try:
            if known is None:
                mlflow.log_params(dict(config))
        except BaseException as error:
            self.close(error)
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, error: BaseException | None) -> None:
        stopped = error is not None and not isinstance(error, Exception)  # by a signal
        status = "KILLED" if stopped else "FINISHED" if error is None else "FAILED"
        self._mlflow.end_run(status)


LOGGERS: dict[str, Callable[..., Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_loggers(names: Sequence[str | Logger]) -> None:
    """Raise ValueError for an unknown name, and ImportError unless its package is installed."""
    for name in names:
        if isinstance(name, str):
            if name not in LOGGERS:
                raise ValueError(f"loggers must be of {', '.join(LOGGERS)}, got {name!r}")
            with extra(name, f"the logger {name}"):
                import_module(_PACKAGES[name])


@contextmanager
def opened(
    names: Sequence[str | Logger], output: Path, first: int, config: Mapping[str, Any]
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield a function that logs a step's metrics to each of the loggers, which are then closed.

    A logger that raises is left out from then on, with a warning.

    Args:
        names: of `LOGGERS`, or loggers.
        output: the run's folder, where identifiers at the services are kept.
        first: the run's next step. config: the run's configuration.

    Raises:
        CheckpointError: for a file of identifiers that is damaged.
    """
    file, loggers = output / IDS, list[Logger]()
    known = read_json(file, CheckpointError) if file.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(v, str) for v in known.values()):
        raise CheckpointError(f"{file} must hold an object of strings; move it away to start anew")
    with ExitStack() as stack:
        ids = dict(known)
        for i, each in enumerate(names):
            if each in names[:i] and isinstance(each, str):
                continue
            logger = each
            if isinstance(each, str):
                logger = made = LOGGERS[each](output, first, config, known.get(each))
                ids |= {each: made.id} if made.id else {}
            assert not isinstance(logger, str)
            stack.push(partial(_close, logger))
            loggers.append(logger)
        if ids != known:
            write_text(file, json.dumps(ids, indent=1))

        def log(step: int, metrics: Mapping[str, float]) -> None:
            for logger in list(loggers):
                try:
                    logger.log(step, metrics)
                except Exception as error:  # a service that is away must not end the run
                    loggers.remove(logger)
                    warnings.warn(
                        f"the logger {type(logger).__name__} failed ({type(error).__name__}: "
                        f"{error}): the run goes on without it",
                        stacklevel=2,
                    )

        yield log


def _close(logger: Logger, kind: object, error: BaseException | None, trace: object) -> None:
    logger.close(error)


def under(part: str, row: Mapping[str, float]) -> dict[str, float]:
    """Return a row's metrics by names with a prefix, without its step and epoch."""
    return {f"{part}/{k}": v for k, v in row.items() if k not in ("step", "epoch")}
