"""The commands `synface pack` and `synface synthesize`, from packed points to folders of faces."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..common.check import check_folder
from .checking import CsvOption, PlotOption, ThresholdOption, TopOption, check_embeddings
from .options import SeedOption, parse_size, refuse
from .terminal import Bar, PackingBar, interrupts, say


def pack_command(
    context: typer.Context,
    count: Annotated[int | None, typer.Option(help="Number of points N.")] = None,
    dim: Annotated[int | None, typer.Option(help="Number of dimensions d.")] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="Objective: orbit, lse, hyperface or langevin; several run one after the other, "
            "and the first one's points go to --output. Default: orbit, or lse with --gallery, "
            "--start or --batch."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of each objective and restart. Default: 500; of orbit 200 to 4000."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes for each objective, instead of --steps.")
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            help="Number of random starts, of which the best packing is saved; side by side for "
            "orbit. Default: 1; for orbit with few points, what costs little."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Random points per step, for large N. Default: all N."),
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option(help="Embeddings to keep close to: .safetensors or .npy.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Weight of the gallery term.")] = 0.5,
    start: Annotated[
        Path | None, typer.Option(help="Embeddings to start from: .safetensors or .npy.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the objective hyperface.")] = 0.001,
    symmetry: Annotated[
        str, typer.Option(help="Symmetry of orbit's points: auto, none, antipodal or cyclic.")
    ] = "auto",
    order: Annotated[
        int | None, typer.Option(help="Order of orbit's group of rotations. Default: chosen.")
    ] = None,
    polish: Annotated[
        int | None,
        typer.Option(
            help="Steps of lse after orbit, for more than 300 points. Default: 0, or 100 with "
            "--gallery."
        ),
    ] = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path, typer.Option(help="Output file (.safetensors); a plot (.png) is written beside it.")
    ] = Path("packed.safetensors"),
    device: Annotated[str, typer.Option(help="Device to compute on.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the checkpoints.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="Embeddings to find the exact closest pairs of, instead of packing."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Other embeddings for --check: each pair takes one from each file."),
    ] = None,
    top: TopOption = 1,
    threshold: ThresholdOption = None,
    csv: CsvOption = None,
    plot: PlotOption = None,
) -> None:
    """Pack N unit vectors in d dimensions, and report the gap to the bound; or check embeddings."""
    from ..synthesis import packing
    from ..synthesis.embeddings import read_embeddings

    if check is not None:
        used = ("check", "against", "top", "threshold", "csv", "plot", "overwrite")
        refuse(context, "with --check", *(name for name in context.params if name not in used))
        if csv is None and plot is None:
            refuse(context, "with --check, but without --csv and --plot", "overwrite")
        check_embeddings(check, against, top, threshold, csv, plot, overwrite)
        return
    if against is not None:
        raise ValueError("--against needs --check")
    refuse(context, "without --check", "top", "threshold", "csv", "plot")
    if gallery is None:
        refuse(context, "without --gallery", "alpha")
    if "hyperface" not in (objective or []):
        refuse(context, "without --objective hyperface", "lr")
    if objective and not {"auto", "orbit"} & set(objective):
        refuse(context, "without --objective orbit", "symmetry", "order", "polish")
    begin = None if start is None else read_embeddings(start)
    keep = None if gallery is None else read_embeddings(gallery)
    if begin is not None:
        count = begin.shape[0] if count is None else count
        dim = begin.shape[1] if dim is None else dim
    if count is None or dim is None:
        raise ValueError("pack needs --count and --dim (or --start), or --check")
    packers = [
        packing.Packer(
            packing.PackConfig(
                count,
                dim,
                each,
                steps=steps,
                minutes=minutes,
                restarts=restarts,
                batch=batch,
                alpha=alpha,
                lr=lr,
                seed=seed,
                symmetry=symmetry if each in ("auto", "orbit") else "auto",
                order=order if each in ("auto", "orbit") else None,
                polish=polish if each in ("auto", "orbit") else None,
            ),
            gallery=keep,
            start=begin,
            device=device,
        )
        for each in objective or ["auto"]
    ]
    bound = packing.bounds.certificate(count, dim)[0]
    say(
        f"{count:,} points in {dim} dimensions: the worst cosine of random points is about "
        f"{packing.bounds.random_worst(count, dim):.4f}, its lower bound "
        f"{bound.cosine:.4f} ({bound.name})"
    )
    if symmetry == "antipodal":
        lines = packing.bounds.certificate(count, dim, antipodal=True)[0]
        say(f"of points in pairs x and −x: {lines.cosine:.4f} ({lines.name})")
    with interrupts("run the same command with --resume to continue"):
        packings = packing.pack(
            packers,
            output,
            resume=resume,
            overwrite=overwrite,
            progress=lambda each: PackingBar(each, bound.cosine),
        )
    for each in packings:
        seconds, number, _ = each.history[-1]
        say(
            f"{each.config.objective}: worst cosine {each.worst:.6f} (points {each.pair[0]} and "
            f"{each.pair[1]}), {each.gap:.6f} above the bound; {number:,} steps, {seconds:.0f} s"
        )
    say(f"written: {output}, {output.with_suffix('.png')}")


def synthesize_command(
    context: typer.Context,
    packed: Annotated[
        Path | None,
        typer.Option(help="Embeddings (N, D), one identity per row: .safetensors or .npy."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Image folder to write.")] = None,
    images_per_identity: Annotated[int, typer.Option(help="Images per identity.", min=1)] = 20,
    generator: Annotated[
        Path,
        typer.Option(
            help="Face generator: heads, eigenfaces, or an ONNX (.onnx) or TorchScript file. "
            "TorchScript is a program: run only trusted files."
        ),
    ] = Path("heads"),
    style_size: Annotated[
        int | None, typer.Option(help="Dimension of the styles, if the generator's file lacks it.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Size of an embedded generator's images (32x32). Default: 48x48."),
    ] = None,
    color: Annotated[bool, typer.Option("--color", help="Draw the heads in color.")] = False,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns of a file's input by control: identity=0:160,expression=160:224."
        ),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to draw what each control does; with it, no --output is needed."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the styles.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per call of the generator.")] = 64,
    workers: Annotated[
        int | None, typer.Option(help="Threads that encode images. Default: one per core.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device that draws.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Generate the missing images.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the images of an earlier run.")
    ] = False,
) -> None:
    """Generate images of packed identities, into an image folder for `train`."""
    from ..synthesis.dataset import synthesize
    from ..synthesis.embeddings import read_embeddings
    from ..synthesis.generators import EMBEDDED, open_generator
    from ..synthesis.preview import RANDOM_SIZE, random_identities
    from ..synthesis.preview import preview as draw_preview

    name = str(generator)
    if name == "eigenfaces":
        refuse(context, "with --generator eigenfaces, drawn on the CPU in gray", "device", "color")
    elif name not in EMBEDDED:
        refuse(context, "with a generator in a file, which has its own", "color")
    if output is None:
        if preview is None:
            raise typer.BadParameter("give --output FOLDER, --preview FILE.png, or both")
        unused = ("resume", "overwrite", "images_per_identity", "workers", "batch_size")
        refuse(context, "without --output", *unused)
    else:
        if packed is None:
            raise typer.BadParameter("--output needs the identities: give --packed FILE")
        check_folder("--output", output)
    known = None if packed is None else read_embeddings(packed)
    asked = parse_size(size)
    if asked is not None and name in EMBEDDED and asked[0] != asked[1]:
        raise ValueError(f"the heads and the eigenfaces are square, got --size {size}")
    dim = None
    if known is not None:
        dim = known.shape[1]
    elif name in EMBEDDED:
        dim = RANDOM_SIZE
    faces = open_generator(
        generator,
        dim,
        style_size=style_size,
        size=asked[0] if asked else None,
        channels=3 if color else None,
        device=device,
        columns=columns,
    )
    embeddings = random_identities(seed, faces.embedding_size) if known is None else known
    if preview is not None:
        draw_preview(faces, embeddings, preview, seed=seed)
        say(f"what each control does: {preview}")
    if output is None:
        return
    began = time.perf_counter()
    with interrupts("run the same command with --resume to continue"), Bar("synthesizing") as bar:
        made = synthesize(
            embeddings,
            faces,
            output,
            images_per_identity,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            resume=resume,
            overwrite=overwrite,
            progress=bar.files,
        )
    seconds = time.perf_counter() - began
    say(
        f"{len(embeddings)} identities, {images_per_identity} images of each in {output}: "
        f"{made} made, {made / seconds:.0f} images/s"
    )
