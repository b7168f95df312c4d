"""The command `synface train`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.check import check_folder
from ..common.files import write_text
from ..training.config import BUILT_IN, TrainConfig
from .options import ConfigOption, from_options, in_words, is_given, options_of, parse_size, refuse
from .started import (
    EMBEDDED,
    FOLDER_SIZE,
    FREE,
    MOVABLE,
    Started,
    command_of,
    located,
    read_faces,
    split_faces,
)
from .terminal import Bar, TrainingBar, console, interrupts, say

if TYPE_CHECKING:  # they import torch, which --help must not wait for
    from ..data import Faces
    from ..data.formats.image_set import LabeledImages
    from ..data.loading.transforms import Transforms
    from ..data.mixing import Ratio
    from ..training.loop import Trained
    from ..training.sources import Source
    from .verification import Verifier

LOG = "log.txt"  # the lines that a run printed


def _ratio(text: str) -> Ratio:
    from ..data.mixing import Beta, Constant, Grid

    name, _, value = text.partition(":")
    try:
        if name == "grid" and not value:
            return Grid()
        return {"beta": Beta, "constant": Constant}[name](float(value))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--mix-ratio must be grid, beta:A with A > 0 or constant:V with V in [0, 1], "
            f"got {text!r}"
        ) from error


def _mixed(
    run: Started, workers: int, transform: Transforms | None
) -> tuple[Source, list[LabeledImages], Faces]:
    """Return the mixture of a run's two domains, the domains, and the real people held out."""
    from ..data import open_images, read_folder
    from ..training.sources import MixedSource

    if not (run.synthetic and run.real) or run.data:
        raise ValueError("--synthetic and --real go together, without --data")
    embedded, size, ratio = run.synthetic == EMBEDDED, parse_size(run.size), _ratio(run.mix_ratio)
    if not embedded and Path(run.synthetic).resolve() == Path(run.real).resolve():
        raise ValueError(f"--synthetic and --real are the same folder, {run.real}")
    real, held = open_images(run.real, run.relabel).split(run.holdout)
    source = MixedSource(
        read_faces(None, size) if embedded else open_images(run.synthetic, run.relabel),
        real,
        ratio=ratio,
        per_sample=run.per_sample,
        size=size or (None if embedded else FOLDER_SIZE),
        workers=workers,
        transform=transform,
    )
    height, width, channels = source.image_shape
    with Bar(f"reading {held.source}") as bar:
        faces = read_folder(held, (height, width), channels == 1, progress=bar.files)
    return source, [source.synthetic, source.real], faces


def _one_domain(
    run: Started, workers: int, transform: Transforms | None
) -> tuple[Source, list[LabeledImages], Faces]:
    """Return the source of a run's faces, the faces, and the people held out."""
    from ..training.sources import FacesSource

    data, size = Path(run.data) if run.data else None, parse_size(run.size)
    faces, held = split_faces(data, size, None, run.relabel, run.holdout, run.memory)
    height, width, channels = held.images.shape[1:]
    options: Any = {"size": (height, width), "grayscale": channels == 1, "workers": workers}
    return FacesSource(faces, transform=transform, **options), [faces], held


@options_of(Started, TrainConfig)
def train_command(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Resume the run in this folder, with its configuration. More --epochs extend it; "
            "--data, --synthetic, --real and --transforms give the new paths of its images and "
            "transforms; the options of verification and --loggers may change."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Number of processes that decode images.", min=1)
    ] = 2,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard, as --loggers does.")
    ] = False,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")] = "auto",
    config_file: ConfigOption = None,
    **given: Any,
) -> None:
    """Train on an image folder (or the embedded faces) and verify on held-out people."""
    from ..common.distributed import joined
    from ..data import read_transforms
    from ..reporting.plots import check_matplotlib
    from ..training.loop import train
    from ..training.model import BEST, check_start, inherited, inherited_from_file, state_of
    from .verification import Verifier, figures

    run, config = from_options(Started, given), from_options(TrainConfig, given)
    if resume is not None:
        refuse(context, "with --resume: the run keeps its configuration", "output", "config_file")
        run, config = _stored_run(context, resume, run, config)
        output = resume
    _refuse_idle(context, run, config)
    rank = context.with_resource(joined(device))
    console.quiet = not rank.leads
    folder = output or rank.broadcast(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    check_folder("--resume" if resume else "--output", folder)
    init = Path(run.init) if run.init and resume is None else None
    if tensorboard:
        names = dict.fromkeys((*run.logger_names, "tensorboard"))
        run = replace(run, loggers=",".join(names))
    starts: Any = {"resume": resume is not None, "init": init, "loggers": run.logger_names}
    starts["init_head"] = run.init_head if init else "auto"
    check_start(config, run.image_size, folder, **starts)
    transform = None
    if run.transforms:
        trusted = resume is None or is_given(context, "transforms")
        transform = read_transforms(Path(run.transforms), trusted)
    mixed = bool(run.synthetic or run.real)
    source, domains, held = (_mixed if mixed else _one_domain)(run, workers, transform)
    sets = (f"{len(d)} images of {len(d.identities)} people from {d.source}" for d in domains)
    say(
        f"{', mixed with '.join(sets)}; {len(held.identities)} people held out; run folder {folder}"
    )
    if init and init.is_dir():
        found, state = state_of(init)
        counts = state["data"].get("identities", 0), source.num_classes
        say(f"the run {inherited(found, *counts, run.init_head)}")
    elif init:
        say(f"the run {inherited_from_file(init)}")
    verifier = Verifier(held) if held.identities else None  # an error, if any, before training
    if verifier is not None:
        check_matplotlib()  # for the report at the end
        measures = figures(verifier.pixels.verification).keys() - {"threshold"}
        if run.best is not None and run.best not in measures:
            raise ValueError(f"--best must be one of {sorted(measures)} here, got {run.best!r}")
    if rank.leads and resume is None:
        _note_alignment(run, folder)
    images, batch, epochs = len(source), config.batch_size, config.epochs
    with (
        interrupts(f"continue with synface train --resume {folder}"),
        TrainingBar(images, batch, epochs, folder / LOG) as bar,
    ):
        result = train(
            config,
            source,
            folder,
            **starts,
            prolong=resume is not None,
            progress=bar,
            command=asdict(run),
            verify=verifier.figures if verifier else None,
            verify_every=run.verify_every,
            best=run.best,
            patience=run.patience,
            device=rank.device,
        )
    if result.timing is not None:
        what = "pairs of images" if mixed else "images"
        where = f" on the first of {rank.ranks} ranks" if rank.ranks > 1 else ""
        say(
            "{samples_per_s:.0f} {what}/s{where}; {workers} workers, {decode_share:.1%} of their "
            "time spent on decoding; {wait_share:.1%} of the time spent on waiting for "
            "them".format(**result.timing, what=what, where=where)
        )
    if result.best:
        say(f"{result.best}: {folder / BEST}")
    if verifier is not None and rank.leads:
        _report(verifier, result, folder)


def _note_alignment(run: Started, folder: Path) -> None:
    """Record in a run's folder how its faces were aligned, for `synface compare --align`."""
    from ..alignment import settings_of
    from ..training.model import ALIGNMENT

    data = run.real or run.data
    settings = settings_of(Path(data)) if data and Path(data).is_dir() else None
    if settings is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: settings[name] for name in ("size", "margin", "grayscale")}
        write_text(folder / ALIGNMENT, json.dumps(kept))


def _report(verifier: Verifier, result: Trained, folder: Path) -> None:
    """Print the verification of a finished run, and write its report."""
    from ..checkpoint.jsonl import Lines
    from ..reporting.plots import training_curves
    from ..training.model import VERIFICATION

    trained = verifier.last or verifier(result.backbone)  # it was finished before
    verifier.print(trained)
    output, log = folder / "report", Lines(folder / VERIFICATION)
    output.mkdir(exist_ok=True)
    verified = log.read() if log.file.exists() else []
    training_curves(result.history, verified, output / "training.png")
    held = verifier.held
    about = {"run": str(folder), "step": len(result.history)}
    about |= {"people": f"{len(held.identities)} never trained on", "images": held.source}
    pictures = {"Training": "training.png"}
    page = verifier.report(output, about, title=folder.name, pictures=pictures)
    say(f"report: {page}")
    say(f"synface eval {folder} verifies this run again")


def _refuse_idle(context: typer.Context, run: Started, config: TrainConfig) -> None:
    """Raise ValueError for an option that has no effect with the others."""
    if run.synthetic or run.real:
        refuse(context, "with --synthetic and --real: they are decoded during training", "memory")
    else:
        refuse(context, "without --synthetic and --real", "mix_ratio", "per_sample")
    if config.schedule != "polynomial":
        refuse(context, f"with --schedule {config.schedule}", "power")
    if config.backbone != "iresnet":
        idle = ["widths", "depths"] + ["dropout"] * (config.backbone not in BUILT_IN)
        refuse(context, f"with --backbone {config.backbone}", *idle)
    if run.patience and not (run.best and run.verify_every):
        raise ValueError(
            f"--patience {run.patience} needs --best and --verify-every: it counts verifications "
            "that are not better"
        )
    if run.init is None:
        refuse(context, "without --init", "init_head")
    if not run.holdout:
        names = ("verify_every", "best", "patience")
        refuse(context, "with --holdout 0: no people are held out to verify on", *names)
        if run.verify_every or run.best:  # of a file
            raise ValueError("verify_every and best need people to verify on, got holdout 0")


def _stored_run(
    context: typer.Context, folder: Path, run: Started, config: TrainConfig
) -> tuple[Started, TrainConfig]:
    """Return a run's options and configuration; raise ValueError for an option that differs.

    More epochs and new paths of the images and of the transforms are allowed; `train` compares the
    images with the run's fingerprint, and the transforms with its own.
    """
    from ..training.model import CONFIG

    now = vars(run) | vars(config)
    run, config = command_of(folder / CONFIG)
    for name, stored in (vars(run) | vars(config)).items():
        value = now[name]
        if not is_given(context, name) or value == stored:
            continue
        if name in FREE or (name in MOVABLE and stored is not None):
            run = replace(run, **{name: value})
        elif name == "epochs" and value > stored:
            config = replace(config, epochs=value)
        else:
            raise ValueError(
                f"--{name.replace('_', '-')} {in_words(value)} differs from the run's "
                f"{in_words(stored)}: a resumed run keeps its configuration"
                + (", except for more epochs" if name == "epochs" else "")
            )
    if config.backbone not in BUILT_IN and not is_given(context, "backbone"):
        raise ValueError(
            f"{folder}: its backbone is {config.backbone}, and code that a run's folder names is "
            f"not imported: give --backbone {config.backbone}, if you trust it"
            if ":" in config.backbone
            else f"{folder}: its backbone is a module passed to train(): resume it in Python, "
            "as train(..., resume=True, backbone=module)"
        )
    paths: Any = {name: located(folder, name, getattr(run, name)) for name in MOVABLE}
    return replace(run, **paths), config
