"""The command `synface leak`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..common.check import check_folder
from ..common.files import write_csv
from .checking import MOST, check_threshold, comparing
from .options import (
    BackboneOption,
    DeviceOption,
    FlipOption,
    RelabelOption,
    chosen_device,
    parse_size,
    refuse,
)
from .started import FOLDER_SIZE
from .terminal import Bar, print_table, say

if TYPE_CHECKING:  # they import torch, which --help must not wait for
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..data import ImageSet
    from ..evaluation.leak import Leak

EMBEDDINGS = (".npy", ".safetensors")
TABLE = "leak.csv"
OF_NETWORK = ("backbone", "flip", "device")


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two data sets.

    Attributes:
        path: as it was given.
        rows: (N, D) embeddings.
        images: the images; None if there are embeddings alone.
        digests: of the images' pixels, or of the rows' bits.
    """

    path: Path
    rows: Tensor
    images: ImageSet | None
    digests: list[bytes]

    def facts(self, row: int) -> dict[str, Any]:
        """Return the name and the identity of a row's image."""
        if self.images is None:
            return {}
        identity = self.images.identities[int(self.images.labels[row])]
        return {"name": self.images.name(row), "identity": identity}

    def about(self) -> dict[str, Any]:
        """Return facts about the set, for the report."""
        kind = "embeddings" if self.images is None else "images"
        facts: dict[str, Any] = {"source": str(self.path), "kind": kind, "rows": len(self.rows)}
        if self.images is not None:
            facts["identities"] = len(self.images.identities)
        return facts


def leak_command(
    context: typer.Context,
    real: Annotated[
        Path,
        typer.Argument(
            help="Real data: images in any format of `train --data`, or embeddings (.npy or "
            ".safetensors).",
            show_default=False,
        ),
    ],
    synthetic: Annotated[
        Path,
        typer.Argument(help="Synthetic data, images or embeddings likewise.", show_default=False),
    ],
    network: Annotated[
        Path | None,
        typer.Option(
            help="Run, or checkpoint, whose network embeds the images. Default: images are "
            "compared by their pixels."
        ),
    ] = None,
    backbone: BackboneOption = None,
    top: Annotated[
        int, typer.Option(help="Number of closest pairs to report.", min=1, max=1000)
    ] = 10,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Cosine above which a pair is a leak; if there is one, the exit status is 1."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("leak-report"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier report.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            help="Height×width in pixels to which images are resized before their pixels are "
            "compared. Default: {}x{}.".format(*FOLDER_SIZE)
        ),
    ] = None,
    flip: FlipOption = True,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 256,
    relabel: RelabelOption = False,
) -> None:
    """Search synthetic data for identities and images of real data; report the closest pairs."""
    from ..evaluation import leak as leaks
    from ..reporting.plots import check_matplotlib
    from ..synthesis import packing

    files = [each.suffix in EMBEDDINGS for each in (real, synthetic)]
    _check_options(context, real, synthetic, files, network)
    check_threshold(threshold)
    names = (leaks.REPORT, TABLE, leaks.NEAREST, leaks.CLOSEST)
    _check_output(output, names, overwrite)
    check_matplotlib()  # raises before the comparison, not after it
    if all(files):
        sides, how = _read(real, synthetic)
    else:
        options = {"flip": flip, "batch_size": batch_size, "device": device}
        sides, how = _embed(real, synthetic, network, backbone, size, relabel, options)
    a, b = sides

    pairs = len(a.rows) * len(b.rows)
    with comparing("nearest neighbors", pairs) as progress:
        nearest = packing.nearest_cosines(b.rows, a.rows, progress=progress)
    with comparing("closest pairs", pairs) as progress:
        closest = packing.closest_pairs(b.rows, a.rows, top, nearest=nearest, progress=progress)
    listed, above = closest, None
    if threshold is not None:
        with comparing("pairs above the threshold", pairs) as progress:
            above, listed = packing.pairs_above(
                b.rows, a.rows, threshold, MOST, nearest=nearest, progress=progress
            )
    context_of = "another row" if a.images is None else "another identity"
    copies = leaks.copies(b.digests, a.digests)
    leak = leaks.Leak(nearest, _context(a), context_of, threshold, above, closest, copies)

    if a.images is None:  # pictures of an earlier report would be of other pairs
        (output / leaks.CLOSEST).unlink(missing_ok=True)
    both = {"synthetic": b, "real": a}
    about = {"real": a.about(), "synthetic": b.about(), "compared_by": how}
    written = leaks.write(
        output,
        leak,
        about,
        lambda side, row: both[side].facts(row),
        _pictures(both, how) if a.images is not None else None,
    )
    _write_table(output / TABLE, listed, both)
    _print(leak, listed, both, [*written, output / TABLE])
    if above:
        raise typer.Exit(1)


def _check_options(
    context: typer.Context, real: Path, synthetic: Path, files: list[bool], network: Path | None
) -> None:
    """Raise ValueError for options that have no effect, and for data of two kinds."""
    if any(files) and network is not None:
        embedded = real if files[0] else synthetic
        raise ValueError(
            f"--network embeds images, and {embedded} holds embeddings: give two sets of images, "
            "or leave out --network"
        )
    if any(files) and not all(files):
        embedded, images = (real, synthetic) if files[0] else (synthetic, real)
        raise ValueError(
            f"both sets must be images or both embeddings, got embeddings in {embedded} and "
            f"images in {images}"
        )
    if all(files):
        refuse(context, "with embeddings", *OF_NETWORK, "size", "batch_size", "relabel")
    elif network is None:
        refuse(context, "without --network", *OF_NETWORK)
    else:
        refuse(context, "with --network: images are resized to the network's size", "size")


def _check_output(folder: Path, names: tuple[str, ...], overwrite: bool) -> None:
    check_folder("--output", folder)
    for name in names:
        file = folder / name
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder: choose another --output")
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: choose another --output, or --overwrite")


def _read(real: Path, synthetic: Path) -> tuple[list[_Side], dict[str, Any]]:
    """Return both sets of embeddings, and facts about the comparison."""
    from ..evaluation.leak import row_digests
    from ..synthesis.embeddings import read_embeddings

    a, b = (read_embeddings(each) for each in (real, synthetic))
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{real} and {synthetic} must have the same dimension, got {a.shape[1]} and "
            f"{b.shape[1]}"
        )
    sides = [_Side(real, a, None, row_digests(a)), _Side(synthetic, b, None, row_digests(b))]
    return sides, {"kind": "embeddings", "dimension": a.shape[1]}


def _embed(
    real: Path,
    synthetic: Path,
    network: Path | None,
    backbone: str | None,
    size: str | None,
    relabel: bool,
    options: dict[str, Any],
) -> tuple[list[_Side], dict[str, Any]]:
    """Return both sets of images with their embeddings, and facts about the comparison."""
    from ..data import open_images
    from ..data.formats.image_set import common_shape
    from ..evaluation.embedding import embed_pixels, embed_store
    from ..evaluation.leak import pixel_digests
    from ..training.model import load_backbone

    wanted = parse_size(size) or FOLDER_SIZE
    sets = [open_images(each, relabel) for each in (real, synthetic)]
    batch = options["batch_size"]
    shape: tuple[int, int, int]
    if network is None:
        shape = common_shape(sets, wanted, None)
        how: dict[str, Any] = {"kind": "pixels"}
    else:
        model, state = load_backbone(network, backbone)
        height, width, channels = state["data"]["image_shape"]
        shape = height, width, channels
        on = chosen_device(options["device"])
        model.to(on)
        how = {"kind": "network", "run": str(network), "step": state["step"]}
        how |= {"flip": options["flip"], "device": str(on)}
    sides = []
    for path, images in zip((real, synthetic), sets, strict=True):
        with Bar(f"embedding {path}") as bar:
            if network is None:
                rows = embed_pixels(images.store, shape, batch_size=batch, progress=bar.files)
            else:
                rows = embed_store(
                    model,
                    images.store,
                    shape,
                    batch_size=batch,
                    flip=options["flip"],
                    resize=True,
                    progress=bar.files,
                )
        with Bar(f"searching {path} for copies") as bar:
            digests = pixel_digests(images.store, progress=bar.files)
        sides.append(_Side(path, rows, images, digests))
    return sides, how | {"image_shape": list(shape), "dimension": sides[0].rows.shape[1]}


def _context(a: _Side) -> Tensor | None:
    """Return the real rows' cosines to the nearest of another identity, or of another row."""
    import torch

    from ..evaluation.leak import nearest_of_another
    from ..synthesis import packing

    count = len(a.rows)
    with comparing(f"neighbors within {a.path}", count * count) as progress:
        if a.images is None:
            if count < 2:
                return None
            return packing.nearest_cosines(a.rows, progress=progress)
        if len(a.images.identities) < 2:
            return None
        labels = torch.as_tensor(a.images.labels, device="cpu")
        return nearest_of_another(a.rows, labels, progress=progress)


def _pictures(both: dict[str, _Side], how: dict[str, Any]) -> Any:
    """Return a function that decodes a row's image, large enough to look at."""
    from ..evaluation.leak import PICTURE

    height, width, _ = how["image_shape"]
    times = max(1, -(-PICTURE // height))

    def picture(side: str, row: int) -> NDArray[np.uint8]:
        images = both[side].images
        assert images is not None
        found: NDArray[np.uint8] = images.store.decode(row, (height * times, width * times), 3)
        return found

    return picture


def _write_table(path: Path, pairs: list[Any], both: dict[str, _Side]) -> None:
    """Write the listed pairs as CSV: with the names and identities of images."""
    images = both["real"].images is not None
    columns = ("row", "name", "identity") if images else ("row",)
    header = ["rank", "cosine", *(f"{side}_{column}" for side in both for column in columns)]
    rows = (
        [rank, pair.cosine, pair.i, *b.facts(pair.i).values(), pair.j, *a.facts(pair.j).values()]
        for b, a in [both.values()]
        for rank, pair in enumerate(pairs, 1)
    )
    write_csv(path, header, rows)


def _print(leak: Leak, listed: list[Any], both: dict[str, _Side], written: list[Path]) -> None:
    from ..evaluation import leak as leaks

    b, a = both["synthetic"], both["real"]
    things = "rows" if a.images is None else "images"
    say(f"{len(b.rows):,} {things} of {b.path} against {len(a.rows):,} of {a.path}")
    for rank, (cosine, i, j) in enumerate(leak.closest, 1):
        names = [side.facts(row).get("name", f"row {row}") for side, row in ((b, i), (a, j))]
        say(f"{rank}. cosine {cosine:.6f}: {names[0]} and {names[1]}")
    found = leak.statistics()
    header = ["nearest cosine", *leaks.QUANTILES.values()]
    if leak.threshold is not None:
        header.append(f"above {leak.threshold:g}")
    rows = []
    for name, each in found.items():
        row = [escape(name), *(f"{cosine:.4f}" for cosine in each["quantiles"].values())]
        if leak.threshold is not None:
            row.append(f"{each['above_threshold']:,} ({each['share_above_threshold']:.2%})")
        rows.append(row)
    print_table(header, rows)
    equal = "bits" if a.images is None else "pixels"
    say(f"{things} of {b.path} with the {equal} of one of {a.path}: {len(leak.copies):,}")
    if leak.above is not None:
        more = "" if leak.above <= len(listed) else f"; {TABLE} has the closest {len(listed):,}"
        say(f"pairs with a cosine above {leak.threshold:g}: {leak.above:,}{more}")
    say(f"written: {', '.join(map(str, written))}")
