"""What commands write to a terminal, and their progress bars."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
from typer.core import TyperGroup

from ..common.interrupts import Terminated

console = Console()


def _encoded(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name as they are; other characters that a terminal lacks as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def encode_anything() -> None:
    """Let no output end in an error for want of a character in the terminal's encoding."""
    codecs.register_error("synface", _encoded)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else it is not the interpreter's own
            stream.reconfigure(errors="synface")


def _untyped(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class Group(TyperGroup):
    """A group of commands whose help gives flags no type; newer typers put <bool> beside them."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _untyped(command.get_params(ctx))
        return command


def say(text: str) -> None:
    """Prints a line as it is: no colors, markup or breaks, so that paths can be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def interrupts(text: str) -> Iterator[None]:
    """On Ctrl-C and SIGTERM says how to go on, and ends with 130 or 143, as shells have it."""
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

    def __init__(self, description: str, done: ProgressColumn | None = None) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            done or MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),  # 80 columns hold no more
            console=console,
        )
        self.task = self.progress.add_task(escape(description), total=None, note="")
        self.images, self.began = 0, time.perf_counter()
        self.before: int | None = None  # files that were there at the first call

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, total_steps: int, step: int) -> None:
        self.progress.update(self.task, total=total_steps, completed=step)

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


class PackingBar(Bar):
    """A share done, the worst cosine, how far it is above the bound, and the time left."""

    def __init__(self, objective: str, bound: float) -> None:
        super().__init__(f"packing, {objective}", TaskProgressColumn())
        self.bound = bound

    def __enter__(self) -> PackingBar:
        super().__enter__()
        return self

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        note = "" if worst is None else f"worst {worst:.4f}, bound + {worst - self.bound:.4f}"
        self.progress.update(self.task, total=1.0, completed=done, note=note)
