"""Terminal output of the commands, and their progress bars."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
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

console = Console()


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


def say(text: str) -> None:
    """Print a line without colors, markup or breaks, so that paths can be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


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
