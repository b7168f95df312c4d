"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.toml import check_keys, read_toml
from ..data.formats.decode import MAX_PIXELS

DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Image folder, one sub-folder per identity; or RecordIO, WebDataset shards, Parquet, "
        "a folder of Hugging Face datasets. "
        "Default: the 100 real faces that scikit-image ships, with style variation."
    ),
]
RelabelOption = Annotated[
    bool,
    typer.Option(
        "--relabel", help="Number the labels that have images from 0 on; else gaps are an error."
    ),
]
HoldoutOption = Annotated[
    int, typer.Option(help="Identities (the last ones) kept for verification.", min=0)
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="Height×width in pixels, such as 112x112. "
        "Default: 56x48 for a folder, 48x48 for the embedded faces."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of everything random.", min=0)]


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Values of a TOML file, for options that the command line does not give."""
    if file is not None:
        values = read_toml(file)
        check_keys(
            file, values, [p.name for p in context.command.params if p.name != "config_file"]
        )
        context.default_map = {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in values.items()
        }
    return file


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of options, by their names with _ for -, such as a run's config.toml; "
        "the command line goes before it.",
        is_eager=True,
        callback=_from_file,
    ),
]


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether the command line itself gives an option, not a file or a default."""
    source = context.get_parameter_source(name)  # click's enum, which typer may vendor
    return source is not None and source.name == "COMMANDLINE"


def refuse(context: typer.Context, why: str, *names: str) -> None:
    """Raise ValueError for an option of these that the command line gives and that does nothing."""
    for param in context.command.params:
        if param.name in names and is_given(context, param.name):
            raise ValueError(f"{'/'.join(param.opts + param.secondary_opts)} has no effect {why}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(p.isdecimal() and len(p) < 10 and int(p) > 0 for p in parts):
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 112x112, got {text[:80]!r}")
    height, width = map(int, parts)
    if height * width > MAX_PIXELS:
        raise ValueError(f"--size must have at most {MAX_PIXELS:,} pixels, got {text[:80]!r}")
    return height, width
