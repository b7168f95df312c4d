"""The command `synface convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.check import check_folder
from ..data.formats.images import FORMATS
from .options import RelabelOption, refuse
from .terminal import Bar, say

UNSHARDED = ("folder", "recordio")


def convert_command(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="Image folder, RecordIO, WebDataset shards, Parquet or a folder of Hugging Face "
            "datasets; the format is detected."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write, which must not exist yet.")],
    to: Annotated[str, typer.Option(help=f"Format to write: {', '.join(FORMATS)}.")],
    relabel: RelabelOption = False,
    shard_size: Annotated[int, typer.Option(help="Size of a shard in MiB.", min=1)] = 512,
) -> None:
    """Write images in another format, with their bytes unchanged."""
    if to in UNSHARDED:
        refuse(context, f"with --to {to}, which has no shards", "shard_size")
    check_folder("the destination's folder", destination.absolute().parent)
    from ..data import convert

    with Bar(f"converting {source}") as bar:
        written = convert(
            source,
            destination,
            to,
            relabel=relabel,
            shard_bytes=shard_size << 20,
            progress=bar.files,
        )
    say(
        f"{destination}: {FORMATS[to].title}; {len(written):,} images of "
        f"{len(written.identities):,} identities"
    )
