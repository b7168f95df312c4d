"""The command `synface eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..common.check import check_folder
from ..evaluation.sets import PairSet, TemplateSet, open_set
from .options import BackboneOption, DeviceOption, FlipOption, RelabelOption, chosen_device, refuse
from .started import MEMORY, Started, command_of, located, read_faces, split_faces
from .terminal import Bar, print_table, say

if TYPE_CHECKING:  # they import torch, which --help must not wait for
    import torch

    from ..data import Faces, ImageSet
    from ..data.formats.image_set import LabeledImages
    from ..evaluation.report import SetResult


def eval_command(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a run, or of one checkpoint, or with --set or --data a file of an "
            "IResNet's weights.",
            show_default=False,
        ),
    ] = None,
    checkpoint_: Annotated[
        Path | None, typer.Option("--checkpoint", help="Folder of the run, as an option.")
    ] = None,
    backbone: BackboneOption = None,
    sets: Annotated[
        list[Path] | None,
        typer.Option(
            "--set",
            help="Verification set: insightface's .bin, LFW's pairs.txt, or a folder of IJB's "
            "lists; several may be given, and held-out people are then skipped.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the images that a --set lists. Default: its own."),
    ] = None,
    resize: Annotated[
        bool,
        typer.Option(
            "--resize",
            help="Resize the images of a --set; otherwise another size is an error. Images of "
            "--data are always resized.",
        ),
    ] = False,
    flip: FlipOption = True,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 256,
    output: Annotated[
        Path | None, typer.Option(help="Folder of a report (table, curves, JSON).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Image folder of other people, or the new path of the run's images. Default: "
            "their recorded path."
        ),
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option(
            help="Number of identities, the last ones, to verify on; 0 for all. Default: as in "
            "training for the run's images, else all.",
            min=0,
        ),
    ] = None,
    relabel: RelabelOption = False,
) -> None:
    """Verify a trained network on pairs of images, against raw pixels, or on verification sets."""
    from ..evaluation import report
    from ..reporting.plots import check_matplotlib
    from ..training.initial import network_of_weights
    from ..training.model import load_backbone
    from .verification import Verifier

    if (run is None) == (checkpoint_ is None):
        raise ValueError("eval needs one run: its folder, or --checkpoint")
    path = run or checkpoint_
    assert path is not None
    if sets:
        if data is not None or holdout is not None:
            raise ValueError("--set cannot be combined with --data or --holdout")
        refuse(context, "with --set", "relabel")
    else:
        refuse(context, "without --set", "images")
        refuse(context, "without --set: images are resized to the network's size", "resize")
        if data is None:
            refuse(context, "without --data: the run's images are read as in training", "relabel")
    if path.is_file():
        if backbone is not None or not (sets or data):
            raise ValueError(
                f"{path} is a file of weights, which has no people and no --backbone: give --set "
                "or --data, or a run's folder"
            )
        network, sizes, size = network_of_weights(path)
        state: dict[str, Any] = {"data": {"image_shape": [*size, sizes.channels]}, "step": None}
    else:
        network, state = load_backbone(path, backbone)
    if output is not None:
        check_folder("--output", output)
        check_matplotlib()  # raises before the verification, not after it
    on = chosen_device(device)
    network.to(on)
    about = {"run": str(path), "step": state["step"], "flip": flip, "device": str(on)}
    options: dict[str, Any] = {"batch_size": batch_size, "flip": flip}
    height, width, channels = state["data"]["image_shape"]
    shape = height, width, channels
    if sets:
        opened_sets = [open_set(each, images) for each in sets]
        results = _evaluate_sets(
            network, opened_sets, shape, resize=resize, scores=output is not None, **options
        )
        if output is not None:
            title = "Verification sets"
            say(f"report: {report.write(output, results, about, image_shape=shape, title=title)}")
        return
    held, unseen = _people(path, state, data, holdout, relabel)
    verifier = Verifier(held, **options)
    trained = verifier(network)
    verifier.print(trained, unseen)
    if output is not None:
        about["people"] = f"{len(held.identities)}{' never trained on' if unseen else ''}"
        say(f"report: {verifier.report(output, about)}")


def _people(
    run: Path, state: dict[str, Any], data: Path | None, holdout: int | None, relabel: bool
) -> tuple[Faces, bool]:
    """Return the people to verify on, and whether they are proven to be new to the network."""
    from .. import checkpoint
    from ..data import Faces, open_images
    from ..training.model import CONFIG
    from ..training.sources import fingerprint

    height, width, channels = state["data"]["image_shape"]
    started = None
    if not run.is_file():
        file = checkpoint.find(run).parent.parent / CONFIG
        started = command_of(file)[0] if data is None or file.exists() else None
    splits = [(holdout, relabel)]
    if started is not None and data is None:
        name = "real" if started.real else "data"
        trained_on = located(run, name, getattr(started, name), "data")
        data = Path(trained_on) if trained_on else None
        splits = [(started.holdout if holdout is None else holdout, started.relabel)]
    elif started is not None and data is not None and holdout is None:
        before = started.holdout, relabel or started.relabel
        if _may_be(open_images(data, before[1]), started, state["data"]):
            splits.insert(0, before)
    for count, renumber in splits:  # the run's own first, which identifies its images
        rest: LabeledImages | None = None
        if count:
            memory = MEMORY if started is None else started.memory  # as in training
            rest, held = split_faces(data, (height, width), channels == 1, renumber, count, memory)
        else:
            held = read_faces(data, (height, width), channels == 1, renumber)
        if held.images.shape[3] != channels:
            raise ValueError(
                f"{run} was trained on images of {channels} channels, {held.source} has "
                f"{held.images.shape[3]}"
            )
        # Only the split of the run itself proves that these people are new to the network.
        wanted = state["data"].get("fingerprint", "").rpartition(" ")[2]
        unseen = rest is not None and fingerprint(rest) == wanted
        if not unseen and isinstance(rest, Faces) and data is not None:  # of a mixed run
            unseen = fingerprint(open_images(data, renumber).split(count or 0)[0]) == wanted
        if unseen:
            break
    return held, unseen


def _may_be(images: ImageSet, started: Started, trained_on: dict[str, Any]) -> bool:
    """Return whether these may be a run's images, without decoding any."""
    from ..training.sources import fingerprint

    people = len(images.identities) - started.holdout
    if not started.holdout or people < 2:
        return False
    if started.real:
        prints = trained_on["fingerprint"].split()
        return fingerprint(images.split(started.holdout)[0]) == prints[-1]
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
    print_table(header, [[escape(cell) for cell in row] for row in rows])
    return results
