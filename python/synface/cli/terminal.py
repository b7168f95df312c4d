"""Terminal output of the commands, and their progress bars."""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.control import Control
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup

from ..common.durations import duration
from ..common.interrupts import Terminated

if TYPE_CHECKING:
    from typing_extensions import Self


class LoggedConsole(Console):
    """A console whose lines are also appended to a file, in plain text, once its path is known.

    Lines that are printed before are kept until then. What a bar shows while it moves is not kept.
    """

    KEPT = 1000  # lines without a file

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.log_to(None)

    def log_to(self, file: Path | None) -> None:
        """Append the lines so far, and those that follow, to a file; None forgets them."""
        self._log = file
        kept = [] if file is None else list(self._kept)
        self._kept: deque[str] = deque(maxlen=self.KEPT)
        for text in kept:
            self._append(text)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if not all(isinstance(each, Control) for each in objects) or not objects:
            self.note(*objects, **options)

    def note(self, *objects: Any, **options: Any) -> None:
        """Append to the file alone."""
        if not self.quiet:
            text = io.StringIO()
            Console(file=text, width=self.width, color_system=None).print(*objects, **options)
            self._append("\n".join(line.rstrip() for line in text.getvalue().split("\n")))

    def _append(self, text: str) -> None:
        if self._log is None:
            self._kept.append(text)
        else:
            with self._log.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)


console = LoggedConsole()


def _encoded(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode the bytes of a file's name as they are, other characters as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def encode_anything() -> None:
    """Escape characters that the terminal's encoding lacks."""
    codecs.register_error("synface", _encoded)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a replaced stream may lack it
            stream.reconfigure(errors="synface")


def _untyped(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Group(TyperGroup):
    """A group of commands whose help shows no type for flags; newer typers show <bool>."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _untyped(command.get_params(ctx))
        return command


def note_warnings(show: Callable[..., None]) -> Callable[..., None]:
    """Return a function that shows a warning as ``show`` does, and appends it to the log."""

    def shown(message: Warning | str, *arguments: Any, **options: Any) -> None:
        show(message, *arguments, **options)
        console.note(f"warning: {message}", markup=False, emoji=False, soft_wrap=True)

    return shown


def say(text: str) -> None:
    """Print a line without colors, markup or breaks, so that paths can be copied."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; its cells may have markup."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def interrupts(text: str) -> Iterator[None]:
    """Print how to resume after Ctrl-C or SIGTERM, and exit with 130 or 143, as shells do."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {text}")
        raise typer.Exit(130) from None
    except Terminated:
        say(f"terminated: {text}")
        raise typer.Exit(Terminated.code) from None


class Bar:
    """A rich progress bar with images/s and loss."""

    def __init__(
        self,
        description: str,
        done: ProgressColumn | None = None,
        left: ProgressColumn | None = None,
    ) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            done or MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            left or TimeRemainingColumn(),  # further columns would exceed 80 characters
            console=console,
        )
        self.task = self.progress.add_task(escape(description), total=None, note="")
        self.images, self.began = 0, time.perf_counter()
        self.before: int | None = None  # files done before the first call

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        console.note(self.progress.get_renderable())

    def start(self, total_steps: int | None, step: int) -> None:
        self.progress.update(self.task, total=total_steps, completed=step)

    def count(self, done: int, total: int) -> None:
        self.start(total, done)

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.images += images
        rate = self.images / (time.perf_counter() - self.began)
        note = f"loss {loss:.2f}, top-1 {accuracy:.0%}, {rate:.0f} images/s"
        self.progress.update(self.task, advance=1, note=note)

    def files(self, done: int, total: int) -> None:
        if self.before is None:
            self.before, self.began = done, time.perf_counter()
        rate = (done - self.before) / max(1e-9, time.perf_counter() - self.began)
        self.progress.update(self.task, total=total, completed=done, note=f"{rate:.0f} images/s")

    def advance(self, note: str) -> None:
        self.progress.update(self.task, advance=1, note=note)


class TrainingBar(Bar):
    """A progress bar of a run, with a line for each epoch where the output is no terminal.

    Args:
        images: number of images in an epoch. batch_size: of a step. epochs: of the run.
        log: the file for the run's lines, whose folder exists when the run starts.
    """

    def __init__(self, images: int, batch_size: int, epochs: int, log: Path) -> None:
        super().__init__("training")
        self.log = log
        self.per_epoch, self.epochs = -(-images // batch_size), epochs
        self.at = 0
        self.totals = [0.0, 0.0, 0]  # loss and accuracy, by images, and images since the last line
        self.since, self.skipped = self.began, 0  # the end of the epoch's first step, its images

    def start(self, total_steps: int | None, step: int) -> None:
        super().start(total_steps, step)
        console.log_to(self.log)
        self.at = step

    def step(self, loss: float, accuracy: float, images: int) -> None:
        super().step(loss, accuracy, images)
        self.at += 1
        if not self.totals[2]:
            # What preceded the epoch's first step, such as a verification, is no part of its time.
            self.since, self.skipped = time.perf_counter(), images
        for i, value in enumerate((loss * images, accuracy * images, images)):
            self.totals[i] += value
        if self.at % self.per_epoch == 0:
            self._line()

    def _line(self) -> None:
        now = time.perf_counter()
        loss, hits, count = self.totals
        line = f"epoch {self.at // self.per_epoch} of {self.epochs}: loss {loss / count:.4f}, "
        line += f"top-1 {hits / count:.1%}"
        if count > self.skipped:
            line += f", {(count - self.skipped) / max(1e-9, now - self.since):.0f} images/s"
        self.totals = [0.0, 0.0, 0]
        (console.note if console.is_terminal else say)(line)


class SweepBar(Bar):
    """A progress bar over the steps of many training runs, which first prints how many, how long.

    Args:
        description: printed, with ``hint`` after it.
    """

    def __init__(self, description: str, hint: str = "") -> None:
        say(f"{description}{hint}")
        super().__init__("training runs", TaskProgressColumn(), TextColumn(""))
        self.first: int | None = None  # steps done before the first of this process

    def cells(self, done: int, total: int) -> None:
        self.progress.update(self.task, description=f"runs {done} of {total}")

    def start(self, total_steps: int | None, step: int) -> None:
        if self.first is None:
            self.first, self.began = step, time.perf_counter()
        self.progress.update(self.task, total=total_steps, completed=step)
        self._left()

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.progress.update(self.task, advance=1)
        self._left()

    def _left(self) -> None:
        """Show the time left, at the mean rate so far."""
        task = self.progress.tasks[0]
        done = task.completed - (self.first or 0)
        if done > 0 and task.total is not None:
            left = (task.total - task.completed) * (time.perf_counter() - self.began) / done
            self.progress.update(self.task, note=f"· {duration(left)} left" if left else "")


class PackingBar(Bar):
    """A progress bar with the worst cosine and its distance to the bound."""

    def __init__(self, objective: str, bound: float) -> None:
        super().__init__(f"packing, {objective}", TaskProgressColumn())
        self.bound = bound

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        note = "" if worst is None else f"worst {worst:.4f}, bound + {worst - self.bound:.4f}"
        self.progress.update(self.task, total=1.0, completed=done, note=note)
