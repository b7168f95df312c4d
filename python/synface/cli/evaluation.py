"""synface eval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..common.check import check_folder
from ..data import open_images
from ..evaluation.sets import PairSet, TemplateSet, open_set
from .options import refuse
from .started import MEMORY, command_of, place, read_faces, split_faces
from .terminal import Bar, console, say

if TYPE_CHECKING:  # they import torch, which takes longer than all else that --help needs
    import torch

    from ..data import ImageSet
    from ..data.loading.loader import Domain
    from ..evaluation.report import SetResult


def eval_command(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, or one checkpoint's.", show_default=False)
    ] = None,
    checkpoint_: Annotated[
        Path | None, typer.Option("--checkpoint", help="The run, given as an option.")
    ] = None,
    sets: Annotated[
        list[Path] | None,
        typer.Option(
            "--set",
            help="A verification set: insightface's .bin, LFW's pairs.txt, or a folder of IJB's "
            "lists; several may be given, and nobody else is verified then.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="With --set: the folder of the images that it lists. Default: its own."),
    ] = None,
    resize: Annotated[
        bool,
        typer.Option(
            "--resize",
            help="With --set: resize images; else another size is an error. Those of --data "
            "always are.",
        ),
    ] = False,
    flip: Annotated[bool, typer.Option(help="Add the embedding of the mirror image.")] = True,
    device: Annotated[
        str,
        typer.Option(
            help="Device of the network: cpu, cuda, cuda:1 …; auto is cuda where there is one."
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 256,
    output: Annotated[
        Path | None, typer.Option(help="Folder of a report (table, curves, JSON).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Image folder: other people, or where the run's images are now. Default: where "
            "they were."
        ),
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option(
            help="Verify on this many last identities; 0: on all. Default: as in training where "
            "the images are the run's, else on all.",
            min=0,
        ),
    ] = None,
    relabel: Annotated[
        bool,
        typer.Option(
            "--relabel",
            help="With --data: number the labels that have images from 0 on; else gaps are an "
            "error.",
        ),
    ] = False,
) -> None:
    """Verify a trained network on pairs of images, beside raw pixels, or on verification sets."""
    from .. import checkpoint
    from ..data import Faces
    from ..evaluation.report import SetResult
    from ..reporting.plots import check_matplotlib
    from ..training.model import CONFIG, load_backbone
    from ..training.sources import fingerprint
    from .verification import print_verification, verify_network, verify_pixels

    if (run is None) == (checkpoint_ is None):
        raise ValueError("eval needs one run: its folder, or --checkpoint")
    run = run or checkpoint_
    assert run is not None
    if sets:
        if data is not None or holdout is not None:
            raise ValueError("--set goes without --data and --holdout")
        refuse(context, "with --set", "relabel")
    else:
        refuse(context, "without --set", "images")
        refuse(context, "without --set: images get the network's size", "resize")
        if data is None:
            refuse(context, "without --data: the run's own is read as in training", "relabel")
    backbone, state = load_backbone(run)
    height, width, channels = state["data"]["image_shape"]
    if output is not None:
        check_folder("--output", output)
        check_matplotlib()  # raises before the verification, not after it
    on = _device(device)
    backbone.to(on)
    about = {"run": str(run), "step": state["step"], "flip": flip, "device": str(on)}
    if sets:
        opened_sets = [open_set(path, images) for path in sets]
        results = _evaluate_sets(
            backbone,
            opened_sets,
            (height, width, channels),
            batch_size=batch_size,
            flip=flip,
            resize=resize,
        )
        _report(output, results, about)
        return
    config, memory = checkpoint.find(run).parent.parent / CONFIG, MEMORY
    if data is None or config.exists():  # held in memory, or not, as in training
        command = command_of(config)[0]
        memory = command["memory"]
    if data is None:
        name = "real" if command["real"] else "data"
        trained_on = place(run, name, command[name], "data")
        data = Path(trained_on) if trained_on else None
        holdout = command["holdout"] if holdout is None else holdout
        relabel = command["relabel"]
    splits = [(holdout, relabel)]
    if holdout is None and data is not None and config.exists():
        before = command["holdout"], relabel or command["relabel"]
        if _may_be(open_images(data, before[1]), command, state["data"]):
            splits.insert(0, before)
    for holdout, relabel in splits:  # the run's own first, by which its images are known
        rest: Domain | None = None
        if holdout:
            rest, held = split_faces(data, (height, width), channels == 1, relabel, holdout, memory)
        else:
            held = read_faces(data, (height, width), channels == 1, relabel)
        if held.images.shape[3] != channels:
            raise ValueError(
                f"{run} was trained on images of {channels} channels, {held.source} has "
                f"{held.images.shape[3]}"
            )
        # Only the split of the run itself proves that these people are new to the network.
        wanted = state["data"]["fingerprint"].split()[-1]
        unseen = rest is not None and fingerprint(rest) == wanted
        if not unseen and isinstance(rest, Faces) and data is not None:  # as a mixed run knows it
            unseen = fingerprint(open_images(data, relabel).split(holdout or 0)[0]) == wanted
        if unseen:
            break
    results = []
    for name, score in (
        ("raw pixels", lambda: verify_pixels(held)),
        ("trained network", lambda: verify_network(backbone, held, batch_size, flip)),
    ):
        began = time.perf_counter()
        found = score()
        seconds = time.perf_counter() - began
        results.append(SetResult(name, held.source, len(held), seconds, found, None))
    pixels, trained = (result.verification for result in results)
    print_verification(trained, pixels, held, unseen)
    people = f"{len(held.identities)}{' never trained on' if unseen else ''}"
    _report(output, results[::-1], about | {"people": people})


def _device(name: str) -> torch.device:
    import torch

    from ..common.check import check_device

    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    return check_device(cuda if name == "auto" else name)


def _report(output: Path | None, results: Sequence[SetResult], about: dict[str, Any]) -> None:
    from ..evaluation import report as set_report

    if output is not None:
        say(f"report: {set_report.write(output, results, about)}")


def _may_be(images: ImageSet, command: dict[str, Any], trained_on: dict[str, Any]) -> bool:
    """Return whether these may be a run's images, as far as that shows without decoding any."""
    from ..training.sources import fingerprint

    people = len(images.identities) - command["holdout"]
    if not command["holdout"] or people < 2:
        return False
    if command["real"]:
        prints = trained_on["fingerprint"].split()
        return fingerprint(images.split(command["holdout"])[0]) == prints[-1]
    return people == trained_on["identities"]


def _evaluate_sets(
    backbone: torch.nn.Module,
    sets: list[PairSet | TemplateSet],
    image_shape: tuple[int, int, int],
    **options: Any,
) -> list[SetResult]:
    from ..evaluation import report as set_report

    results = []
    for each in sets:
        with Bar(f"embedding {each.name}") as bar:
            results.append(
                set_report.evaluate_set(backbone, each, image_shape, progress=bar.files, **options)
            )
    header, *rows = set_report.table(results)
    shown = Table(*header)
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    return results
