"""The commands that use a trained network: `synface embed`, `compare` and `export`."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.check import check_folder
from .checking import check_threshold
from .options import BackboneOption, DeviceOption, FlipOption, chosen_device
from .terminal import Bar, say

if TYPE_CHECKING:  # they import torch, which --help must not wait for
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..alignment import Aligner
    from ..inference import FaceNetwork

RunArgument = Annotated[
    Path,
    typer.Argument(
        help="Folder of a run, or of one checkpoint (RUN/best), or a file of an IResNet's weights.",
        show_default=False,
    ),
]
AlignOption = Annotated[
    bool,
    typer.Option(
        "--align",
        help="Find the largest face of each photo, and crop it as the training images were by "
        "`synface align`, or to ArcFace's template.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")]
CHECKED = 10  # images that an exported file is compared on
SAME, DIFFERENT = "same person", "different people"


def embed_command(
    run: RunArgument,
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, folders of images, or any other set of images that `train --data` "
            "takes; folders are searched recursively.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="File of the embeddings and the images' names: .safetensors, .npy (with the names "
            "beside it), .npz or .parquet.",
            show_default=False,
        ),
    ],
    overwrite: OverwriteOption = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Leave out images that cannot be decoded, and with --align photos without a face, "
            "and report them; the exit status is then 1. Otherwise the first ones end the command.",
        ),
    ] = False,
    align: AlignOption = False,
    flip: FlipOption = True,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 256,
    backbone: BackboneOption = None,
) -> None:
    """Write the embeddings of images by a trained network to a file, with the images' names."""
    from ..alignment import AlignedFaces
    from ..data import DataError
    from ..inference import find_images, load, write_embeddings
    from ..inference.files import files_of

    _check_outputs("--output", files_of(output), overwrite)
    found = find_images(paths)
    network = load(run, backbone=backbone, device=chosen_device(device), flip=flip)
    bad: dict[int, str] | None = {} if skip_bad else None
    store: Any = found.store
    if align:  # in small batches, since finding a face takes longer than embedding it
        store, batch_size = AlignedFaces(store, _aligner(run)), min(batch_size, 32)
    with Bar("embedding") as bar:
        try:
            rows = network.embed(store, batch_size=batch_size, bad=bad, progress=bar.files)
        except DataError as error:
            hint = "" if skip_bad else "\n--skip-bad leaves out such images"
            if not align:
                raise DataError(f"{error}{hint}") from error
            say(f"{error}{hint}")
            raise typer.Exit(1) from None
    good = [i for i in range(len(found.store)) if not bad or i not in bad]
    names = [found.store.name(i) for i in good]
    identities = [found.identities[i] for i in good]
    height, width, channels = network.image_shape
    about = {"run": str(run), "step": network.description.get("step"), "flip": flip}
    about |= {"image_shape": [height, width, channels]}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_embeddings(output, rows, names, identities, about)
    known = {each for each in identities if each is not None}
    people_of = f" of {len(known):,} people" if known else ""
    say(
        f"{len(names):,} images{people_of} as embeddings of {network.embedding_size} numbers: "
        f"{', '.join(map(str, files_of(output)))}"
    )
    if bad:
        for index in sorted(bad):
            say(f"left out {found.store.name(index)}: {bad[index]}")
        why = "have no face, or cannot be decoded," if align else "cannot be decoded"
        say(f"{len(bad):,} of {len(found.store):,} images {why} and were left out")
        raise typer.Exit(1)


def compare_command(
    run: RunArgument,
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more images, or folders of images of one person each, which count as the "
            "mean of their embeddings.",
            show_default=False,
        ),
    ],
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Least cosine of the same person. Default: the threshold of the run's last "
            "verification.",
            show_default=False,
        ),
    ] = None,
    align: AlignOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    device: DeviceOption = "auto",
    backbone: BackboneOption = None,
) -> None:
    """Tell whether images show the same person, by the cosine of a trained network's embeddings.

    The exit status is 0 for either verdict, and 1 if --align finds no face in a photo, or cannot
    read it.
    """
    from ..inference import load, recorded_threshold

    check_threshold(threshold)
    if len(images) < 2:
        raise ValueError(f"compare needs two images or more, got {len(images)}")
    network = load(run, backbone=backbone, device=chosen_device(device))
    recorded = recorded_threshold(run) if threshold is None else None
    least = threshold if recorded is None else recorded.value
    aligner, bad = _aligner(run) if align else None, dict[str, str]()
    rows = [_embedding(network, path, aligner, bad) for path in images]
    for name, reason in bad.items():
        typer.echo(f"{name}: {reason}", err=as_json)
    if bad:
        raise typer.Exit(1)
    pairs: list[dict[str, Any]] = [
        {"first": str(a), "second": str(b), "cosine": float(x @ y)}
        for (a, x), (b, y) in combinations(zip(images, rows, strict=True), 2)
    ]
    for pair in pairs:
        pair["same_person"] = None if least is None else pair["cosine"] >= least
    source = None if threshold is None else "--threshold"
    if recorded is not None:
        source = f"{recorded.file}, step {recorded.step}"
    accuracy = None if recorded is None else recorded.accuracy
    if as_json:
        about = {"threshold": least, "threshold_from": source, "accuracy": accuracy}
        say(json.dumps(about | {"pairs": pairs}, indent=1))
        return
    _print_pairs(pairs)
    if least is None:
        kind = "a file of weights" if run.is_file() else "the run"
        say(
            f"no verdict, for {kind} has no threshold: give --threshold, such as one that `synface "
            "eval` prints with its accuracy; a run that verifies people held out records one"
        )
        return
    held = "" if accuracy is None else f", whose accuracy was {accuracy:.4f}"
    say(f"{SAME}: from a cosine of {least:.4f} on ({source}{held})")


def export_command(
    run: RunArgument,
    onnx: Annotated[
        Path | None, typer.Option(help="ONNX file, for onnxruntime and others.")
    ] = None,
    torchscript: Annotated[
        Path | None, typer.Option(help="TorchScript file, for torch.jit.load and libtorch.")
    ] = None,
    torch_export: Annotated[
        Path | None, typer.Option(help="File for torch.export.load, usually .pt2.")
    ] = None,
    safetensors: Annotated[
        Path | None,
        typer.Option(help="File of the backbone's weights alone, under their own names."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Image, or set of images, of which ten are compared too, besides ten of random "
            "pixels."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    flip: FlipOption = True,
    backbone: BackboneOption = None,
) -> None:
    """Write a trained network, with its preprocessing, to files that other programs load.

    Each file is loaded again and compared with the network. If an embedding differs by more than
    1e-5, the file is not kept and the exit status is 1.
    """
    from ..inference import Exporter, ExportError, load

    given = {
        "onnx": onnx,
        "torchscript": torchscript,
        "torch-export": torch_export,
        "safetensors": safetensors,
    }
    files = {kind: file for kind, file in given.items() if file is not None}
    if not files:
        raise ValueError(f"export needs a file: --{', --'.join(given)}")
    if len({file.absolute() for file in files.values()}) < len(files):
        raise ValueError(
            f"each format needs a file of its own, got {', '.join(map(str, files.values()))}"
        )
    for kind, file in files.items():
        _check_outputs(f"--{kind}", [file], overwrite)
    network = load(run, backbone=backbone, flip=flip)
    exporter = Exporter(network, None if images is None else _some_images(network, images))
    failed = False
    for kind, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            difference = exporter.write(kind, file)
        except ExportError as error:
            say(str(error))
            failed = True
        else:
            say(
                f"written: {file}, {file.stat().st_size:,} bytes; loaded again, its "
                f"embeddings differ from the network's by at most {difference:.1g}"
            )
    if failed:
        raise typer.Exit(1)


def _check_outputs(option: str, files: list[Path], overwrite: bool) -> None:
    """Raise OSError unless files can be written, and would replace others only if they may."""
    from ..synthesis.packing.packer import check_output

    for file in files:
        check_output(file, overwrite)
        check_folder(f"the folder of {option}", file.parent)


def _aligner(run: Path) -> Aligner:
    """Return an aligner that crops as a run's training images were, or to ArcFace's template."""
    from ..alignment import Aligner, RetinaFace
    from ..inference import recorded_alignment

    settings = recorded_alignment(run) or {}
    return Aligner(detector=RetinaFace(threads=1), **settings)


def _embedding(
    network: FaceNetwork, path: Path, aligner: Aligner | None, bad: dict[str, str]
) -> Tensor:
    """Return the embedding of an image, or the mean of a folder's, as a unit vector.

    Args:
        aligner: finds the face of each photo; None takes images as they are.
        bad: where photos without a face are entered, by name, with the reason.
    """
    import torch
    import torch.nn.functional as F

    from ..alignment import AlignedFaces
    from ..data import DataError
    from ..inference import find_images

    store = find_images([path]).store
    if aligner is None:
        rows = network.embed(store)
    else:
        wrong: dict[int, str] = {}
        try:
            rows = network.embed(AlignedFaces(store, aligner), bad=wrong)
        except DataError:  # no photo has a face
            rows = torch.empty(0, network.embedding_size, dtype=torch.float32, device="cpu")
        bad |= {store.name(row): reason for row, reason in wrong.items()}
    return F.normalize(rows.double().mean(0), dim=0) if len(rows) > 1 else rows.double().sum(0)


def _some_images(network: FaceNetwork, path: Path) -> NDArray[np.uint8]:
    """Return ten images of a path, or all if they are fewer, as the network takes them."""
    import numpy as np

    from ..data.formats import decode
    from ..inference import find_images

    store = find_images([path]).store
    rows = np.linspace(0, len(store) - 1, min(CHECKED, len(store))).astype(int).tolist()
    images = np.empty((len(rows), *network.image_shape), np.uint8)
    done = [decode.attempt(store.decode_into)(images[i], row) for i, row in enumerate(rows)]
    wrong = {store.name(row): text for row, (_, text) in zip(rows, done, strict=True) if text}
    decode.raise_if(wrong, f"of {len(rows)} images", "readable, complete images")
    return images


def _print_pairs(pairs: list[dict[str, Any]]) -> None:
    """Print each pair on a line, which no terminal cuts: paths may be long."""
    verdicts = {True: SAME, False: DIFFERENT, None: ""}
    if len(pairs) == 1:
        verdict = verdicts[pairs[0]["same_person"]]
        say(f"cosine {pairs[0]['cosine']:.4f}" + (f": {verdict}" if verdict else ""))
        return
    say(f"{'cosine':<9}{'verdict':<18}images")
    for each in pairs:
        verdict = verdicts[each["same_person"]]
        say(f"{each['cosine']:<9.4f}{verdict:<18}{each['first']} and {each['second']}")
