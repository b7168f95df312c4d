"""Write docs/api/cli.md, the reference of the command line, from the commands themselves.

    python tools/cli_reference.py

A committed page needs no typer where the site is built; a test compares it with the commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api" / "cli.md"
HEAD = """\
# Command line

Every command of `synface` with its options, as `synface COMMAND --help` prints them. An option
without a default may be left out unless its help says otherwise. `python tools/cli_reference.py`
writes this page.
"""


def page() -> str:
    """Return the text of the page."""
    from synface.cli import app

    return "\n".join([HEAD, *sections("synface", get_command(app))])


def sections(name: str, command: Any) -> Iterator[str]:
    """Yield the sections of a command and of its subcommands."""
    commands = getattr(command, "commands", None)
    if commands is None:
        yield section(name, command)
        return
    if name != "synface":
        yield f"## {name}\n\n{text(command.help)}\n"
    for each, subcommand in commands.items():
        if not subcommand.hidden:
            yield from sections(f"{name} {each}", subcommand)


def section(name: str, command: Any) -> str:
    """Return the section of a command: its synopsis, its help, and a table of its options."""
    level = "#" * name.count(" ")
    shown = [param for param in command.params if not getattr(param, "hidden", False)]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    synopsis = " ".join([name, *map(metavar, arguments), "[OPTIONS]"])
    lines = [f"#{level} {name}", "", f"`{synopsis}`", "", text(command.help), ""]
    lines += ["| Option | Default | |", "| --- | --- | --- |"]
    for param in sorted(shown, key=lambda param: param.param_type_name == "option"):
        names = [metavar(param)] if param in arguments else [*param.opts, *param.secondary_opts]
        lines.append(
            f"| {', '.join(f'`{n}`' for n in names)} | {default(param)} | {help_of(param)} |"
        )
    return "\n".join([*lines, ""])


def metavar(argument: Any) -> str:
    """Return an argument as a synopsis has it."""
    return f"{argument.name.upper()}{'…' if argument.nargs != 1 else ''}"


def default(param: Any) -> str:
    """Return a parameter's default as a cell."""
    if param.required:
        return "required"
    if param.default is True:
        return "on"
    return "" if param.default is False or param.default in (None, "") else f"`{param.default}`"


def help_of(param: Any) -> str:
    """Return a parameter's help as a cell."""
    return text(param.help or "").replace("|", "\\|")


def text(help_: str) -> str:
    """Return a help text with paragraphs as lines of their own and nothing taken for Markdown."""
    return help_.strip().replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
