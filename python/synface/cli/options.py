"""Options that commands share, and options from the fields of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from inspect import Parameter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_origin, get_type_hints

import typer

from ..common.toml import check_keys, read_toml
from ..data.formats.decode import MAX_PIXELS

if TYPE_CHECKING:  # --help must not wait for torch
    import torch

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., None])

RELABEL = "Renumber the labels that have images from 0; otherwise gaps are an error."
RelabelOption = Annotated[bool, typer.Option("--relabel", help=RELABEL)]
SeedOption = Annotated[int, typer.Option(help="Random seed.", min=0)]
BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="Function that builds the run's backbone, as package.module:function; required if it "
        "is not built in, since code that a checkpoint names is not imported."
    ),
]
FlipOption = Annotated[bool, typer.Option(help="Add the embedding of the flipped image.")]
DeviceOption = Annotated[
    str,
    typer.Option(help="Device of the network: cpu, cuda, cuda:1 …; auto uses cuda if available."),
]


def options_of(first: type, *last: type) -> Callable[[Command], Command]:
    """Return a decorator that gives a command an option for each field of dataclasses.

    The command takes their values as ``**given``. The options of ``first`` come before its own in
    the help, those of ``last`` after them; an own option of a field's name takes the field's place.
    A field's metadata are those of `synface.training.config.option`.
    """

    def decorate(command: Command) -> Command:
        context, *rest, _ = inspect.signature(command, eval_str=True).parameters.values()
        own = {each.name: each for each in rest}
        added = [
            [own.pop(f.name) if f.name in own else _parameter(cls, f) for f in fields(cls)]
            for cls in (first, *last)
        ]
        parameters = [context, *added[0], *own.values(), *chain.from_iterable(added[1:])]
        found: Any = command
        found.__signature__ = inspect.Signature(parameters)
        found.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _parameter(cls: type, field: Field[Any]) -> Parameter:
    hint, default = get_type_hints(cls)[field.name], field.default
    if get_origin(hint) is tuple:
        hint, default = str, in_words(default)
    names = [f"--{field.name.replace('_', '-')}"] if hint is bool else []  # no --no-…
    given = field.metadata
    option = typer.Option(*names, help=given["help"], min=given["least"], max=given["most"])
    annotation: Any = Annotated[given["type"] or hint, option]
    return Parameter(
        field.name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
    )


def from_options(cls: type[T], given: Mapping[str, Any]) -> T:
    """Return the dataclass of the values that `options_of` gave a command."""
    hints, values = get_type_hints(cls), {}
    for name, hint in hints.items():
        value = given[name]
        if get_origin(hint) is tuple:
            value = _integers(name, value)
        values[name] = str(value) if isinstance(value, Path) else value
    return cls(**values)


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{name} must be integers such as 16,32,64, got {text!r}") from None


def in_words(value: Any) -> Any:
    """Return a value in the command line's syntax."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Read the values of options that the command line does not give from a TOML file."""
    if file is not None:
        values = read_toml(file)
        check_keys(
            file, values, [p.name for p in context.command.params if p.name != "config_file"]
        )
        context.default_map = {name: in_words(value) for name, value in values.items()}
    return file


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of option values, named with _ for -, such as a run's config.toml; "
        "options on the command line override them.",
        is_eager=True,
        callback=_from_file,
    ),
]


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether the command line itself gives an option, not a file or a default."""
    source = context.get_parameter_source(name)  # click's enum, which typer may vendor
    return source is not None and source.name == "COMMANDLINE"


def refuse(context: typer.Context, why: str, *names: str) -> None:
    """Raise ValueError if the command line gives one of these options, which has no effect."""
    for param in context.command.params:
        if param.name in names and is_given(context, param.name):
            raise ValueError(f"{'/'.join(param.opts + param.secondary_opts)} has no effect {why}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return the (H, W) of a ``--size``; raise ValueError for invalid text."""
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(p.isdecimal() and len(p) < 10 and int(p) > 0 for p in parts):
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 112x112, got {text[:80]!r}")
    height, width = map(int, parts)
    if height * width > MAX_PIXELS:
        raise ValueError(f"--size must have at most {MAX_PIXELS:,} pixels, got {text[:80]!r}")
    return height, width


def chosen_device(name: str) -> torch.device:
    """Return the device of a name; of "auto" the first GPU if there is one, else the CPU."""
    import torch

    from ..common.check import check_device

    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    return check_device(cuda if name == "auto" else name)
