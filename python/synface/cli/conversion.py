"""synface convert."""

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
            "datasets, found out by what is there."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")],
    relabel: RelabelOption = False,
    shard_size: Annotated[
        int, typer.Option(help="MiB after which another shard is begun.", min=1)
    ] = 512,
) -> None:
    """Write images in another format, their bytes as they are."""
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
