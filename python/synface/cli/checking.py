"""The check of embeddings by `synface pack --check`, and what `synface leak` shares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..common.check import check_folder, check_number
from ..common.files import write_csv
from .terminal import Bar, say

MOST = 100_000  # pairs that are listed
LONG = 1 << 28  # pairs whose comparison takes a second or so

TopOption = Annotated[
    int, typer.Option(help="Number of closest pairs to list for --check.", min=1, max=MOST)
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="Cosine for --check: pairs above it are counted, and if there is one the exit status "
        "is 1.",
    ),
]
CsvOption = Annotated[
    Path | None,
    typer.Option(
        help="CSV file to write the --top pairs of --check to; with --threshold, all above it, up "
        f"to {MOST:,}."
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        help="PNG file for --check: the rows' cosines to their nearest neighbors, beside those of "
        "random points and the bound."
    ),
]


@contextmanager
def comparing(what: str, pairs: int) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar if there are many pairs to compare, and yield its update."""
    if pairs < LONG:
        yield None
        return
    with Bar(what) as bar:
        yield bar.count


def check_threshold(threshold: float | None) -> None:
    """Raise ValueError unless a threshold is a cosine."""
    if threshold is not None:
        check_number("--threshold", threshold, -1, 1)


def check_embeddings(
    file: Path,
    against: Path | None,
    top: int,
    threshold: float | None,
    csv: Path | None,
    plot: Path | None,
    overwrite: bool,
) -> None:
    """Print, and write, the closest pairs of embeddings; exit with 1 if one is over a threshold."""
    from ..reporting.plots import check_matplotlib
    from ..synthesis import packing
    from ..synthesis.embeddings import read_embeddings
    from ..synthesis.packing.packer import check_output
    from ..synthesis.packing.pairs import number_of_pairs
    from ..synthesis.packing.plot import plot_nearest

    check_threshold(threshold)
    if plot is not None and plot.suffix != ".png":
        raise ValueError(f"--plot must be a .png file, got {plot}")
    outputs = [each for each in (csv, plot) if each is not None]
    for each in outputs:
        check_output(each, overwrite)
        check_folder(f"the folder of {each.name}", each.parent)
    if plot is not None:
        check_matplotlib()  # before the search, not after it
    rows = read_embeddings(file)
    other = None if against is None else read_embeddings(against)
    if other is not None and rows.shape[1] != other.shape[1]:
        raise ValueError(
            f"{file} and {against} must have the same dimension, got {rows.shape[1]} and "
            f"{other.shape[1]}"
        )
    if other is None and len(rows) < 2:
        raise ValueError(f"{file} must have two rows or more, got {len(rows)}")
    total = number_of_pairs(rows, other)
    with comparing("nearest neighbors", total) as progress:
        nearest = packing.nearest_cosines(rows, other, progress=progress)
    with comparing("closest pairs", total) as progress:
        pairs = packing.closest_pairs(rows, other, top, nearest=nearest, progress=progress)
    found = None
    if threshold is not None:
        with comparing("pairs above the threshold", total) as progress:
            limit = 0 if csv is None else MOST
            found = packing.pairs_above(
                rows, other, threshold, limit, nearest=nearest, progress=progress
            )

    worst = pairs[0]
    say(
        f"worst cosine {worst.cosine:.6f}: row {worst.i} of {file} and row {worst.j} of "
        f"{against or file}"
    )
    for rank, pair in enumerate(pairs[1:], 2):
        say(f"{rank}. cosine {pair.cosine:.6f}: row {pair.i} and row {pair.j}")
    if found is not None:
        say(f"pairs with a cosine above {threshold:g}: {found.total:,} of {total:,}")
    count, dim = rows.shape
    if other is None and dim > 1:
        bound = packing.bounds.certificate(count, dim)[0]
        say(
            f"{count:,} points in {dim} dimensions: bound {bound.cosine:.6f} ({bound.name}), "
            f"random points about {packing.bounds.random_worst(count, dim):.6f}"
        )
    for each in outputs:
        each.parent.mkdir(parents=True, exist_ok=True)
    if csv is not None:
        listed = pairs if found is None else found.pairs
        header = ("rank", "cosine", "first_row", "second_row")
        write_csv(csv, header, ((rank, *pair) for rank, pair in enumerate(listed, 1)))
        if found is not None and found.total > len(listed):
            say(f"{csv} has the closest {len(listed):,} of these pairs")
    if plot is not None:
        others = None if other is None else len(other)
        lines = {} if threshold is None else {f"threshold {threshold:g}": threshold}
        plot_nearest(nearest, dim, plot, others=others, **lines)
    if outputs:
        say(f"written: {', '.join(map(str, outputs))}")
    if found is not None and found.total:
        raise typer.Exit(1)
