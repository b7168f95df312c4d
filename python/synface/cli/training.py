"""synface train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.check import check_folder
from ..data import open_images
from ..training.config import TrainConfig
from .options import (
    ConfigOption,
    DataOption,
    HoldoutOption,
    RelabelOption,
    SeedOption,
    SizeOption,
    is_given,
    parse_size,
    refuse,
)
from .started import (
    EMBEDDED,
    EMBEDDED_SIZE,
    FOLDER_SIZE,
    MEMORY,
    PLACES,
    absolute,
    command_of,
    place,
    read_faces,
    split_faces,
)
from .terminal import Bar, console, interrupts, say

if TYPE_CHECKING:  # they import torch, which takes longer than all else that --help needs
    from ..data import Faces
    from ..data.mixing import Ratio
    from ..training.sources import MixedSource

DEFAULT = TrainConfig  # its class attributes


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be integers such as 16,32,64, got {text!r}") from None


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


def _mixed(run: dict[str, Any], workers: int) -> tuple[MixedSource, Faces]:
    """The two domains that a run mixes, and the real people held out."""
    from ..data import read_folder
    from ..training.sources import MixedSource

    if not (run["synthetic"] and run["real"]) or run["data"]:
        raise ValueError("--synthetic and --real go together, without --data")
    embedded, size = run["synthetic"] == EMBEDDED, parse_size(run["size"])
    ratio = _ratio(run["mix_ratio"])
    if not embedded and Path(run["synthetic"]).resolve() == Path(run["real"]).resolve():
        raise ValueError(f"--synthetic and --real are the same folder, {run['real']}")
    real, held = open_images(run["real"], run["relabel"]).split(run["holdout"])
    source = MixedSource(
        read_faces(None, size) if embedded else open_images(run["synthetic"], run["relabel"]),
        real,
        ratio=ratio,
        per_sample=run["per_sample"],
        size=size or (None if embedded else FOLDER_SIZE),
        workers=workers,
    )
    height, width, channels = source.image_shape
    with Bar(f"reading {held.source}") as bar:
        return source, read_folder(held, (height, width), channels == 1, progress=bar.files)


def train_command(
    context: typer.Context,
    data: DataOption = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            help=f"Train on these images mixed with --real: an image folder, or {EMBEDDED!r} for "
            "the embedded faces."
        ),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="The real images; see --synthetic.")] = None,
    mix_ratio: Annotated[
        str, typer.Option(help="Of the synthetic share: grid (0, 0.05, … 1), beta:A, constant:V.")
    ] = "grid",
    per_sample: Annotated[
        bool, typer.Option("--per-sample", help="A share for each image, not for each batch.")
    ] = False,
    memory: Annotated[
        int,
        typer.Option(
            help="MiB that the images of --data may take, decoded to RGB, to be held in memory; "
            "those of a larger set are decoded while it trains.",
            min=0,
        ),
    ] = MEMORY,
    workers: Annotated[
        int, typer.Option(help="Processes that decode images while it trains.", min=1)
    ] = 2,
    holdout: HoldoutOption = 10,
    output: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder, as it was configured. More --epochs prolong "
            "it; --data, --synthetic and --real say where its images are now."
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the network of this run, and its class centers where the identities "
            "are as many."
        ),
    ] = None,
    size: SizeOption = None,
    relabel: RelabelOption = False,
    seed: SeedOption = DEFAULT.seed,
    epochs: int = DEFAULT.epochs,
    batch_size: int = DEFAULT.batch_size,
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a batch goes through the network.")
    ] = DEFAULT.accumulate,
    precision: Annotated[
        str, typer.Option(help="Of the network: float32, bfloat16 or float16.")
    ] = DEFAULT.precision,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw")] = DEFAULT.optimizer,
    lr: float = DEFAULT.lr,
    weight_decay: float = DEFAULT.weight_decay,
    schedule: Annotated[
        str, typer.Option(help="cosine, polynomial, step or constant")
    ] = DEFAULT.schedule,
    power: Annotated[float, typer.Option(help="Of the polynomial schedule.")] = DEFAULT.power,
    warmup_epochs: float = DEFAULT.warmup_epochs,
    clip_norm: Annotated[
        float, typer.Option(help="Of the network's gradient; 0 leaves it.")
    ] = DEFAULT.clip_norm,
    freeze_statistics: Annotated[
        bool, typer.Option("--freeze-statistics", help="Normalize by the running statistics.")
    ] = DEFAULT.freeze_statistics,
    sample_rate: Annotated[
        float, typer.Option(help="Share of the classes that take part in a step (Partial FC).")
    ] = DEFAULT.sample_rate,
    fused_update: Annotated[
        bool,
        typer.Option(
            "--fused-update", help="The backward pass steps the centers: no gradient of theirs."
        ),
    ] = DEFAULT.fused_update,
    scale: Annotated[float, typer.Option(help="Of the logits.")] = DEFAULT.scale,
    m1: Annotated[float, typer.Option(help="Margin: factor of the angle.")] = DEFAULT.m1,
    m2: Annotated[float, typer.Option(help="Margin: radians added to the angle.")] = DEFAULT.m2,
    m3: Annotated[float, typer.Option(help="Margin: taken off the cosine.")] = DEFAULT.m3,
    widths: Annotated[str, typer.Option(help="Channels of each stage.")] = _joined(DEFAULT.widths),
    depths: Annotated[str, typer.Option(help="Blocks of each stage.")] = _joined(DEFAULT.depths),
    embedding_size: int = DEFAULT.embedding_size,
    dropout: float = DEFAULT.dropout,
    augment: Annotated[float, typer.Option(help="Strength; 0 for none.")] = DEFAULT.augment,
    checkpoint_every: Annotated[
        float, typer.Option(help="Epochs; 0.1 is a tenth of one.")
    ] = DEFAULT.checkpoint_every,
    verify_every: Annotated[
        float,
        typer.Option(help="Epochs between verifications on the way; 0: only at the end.", min=0),
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the run's figures for TensorBoard.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    config_file: ConfigOption = None,
) -> None:
    """Train on an image folder (or the embedded faces) and verify on people kept out."""
    from ..common.distributed import joined
    from ..training.loop import train
    from ..training.model import check_start, inherited, state_of
    from ..training.sources import FacesSource
    from .verification import figures, print_verification, verify_network, verify_pixels

    given = context.params | {"widths": _numbers("--widths", widths)}
    given["depths"] = _numbers("--depths", depths)
    run: dict[str, Any] = {
        "data": absolute(data),
        "synthetic": absolute(synthetic),
        "real": absolute(real),
        "mix_ratio": mix_ratio,
        "per_sample": per_sample,
        "holdout": holdout,
        "size": size,
        "relabel": relabel,
        "memory": memory,
        "init": absolute(init),
    }
    names = {f.name for f in fields(TrainConfig)} & given.keys()
    config = TrainConfig(**{name: given[name] for name in names})
    if resume is not None:
        refuse(context, "with --resume: the run goes on as it was", "output", "config_file")
        run, config = _stored_run(context, resume, run)
        output = resume
    _refuse_idle(context, run, config)
    rank = context.with_resource(joined(device))
    console.quiet = not rank.leads
    folder = output or rank.agreed(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    check_folder("--resume" if resume else "--output", folder)
    starts: dict[str, Any] = {
        "resume": resume is not None,
        "init": Path(run["init"]) if run["init"] and resume is None else None,
        "tensorboard": tensorboard,
    }
    check_start(config, _image_size(run), folder, **starts)
    source: FacesSource | MixedSource
    if run["synthetic"] or run["real"]:
        source, held = _mixed(run, workers)
        domains = [source.synthetic, source.real]
    else:
        faces, held = split_faces(
            Path(run["data"]) if run["data"] else None,
            parse_size(run["size"]),
            None,
            run["relabel"],
            run["holdout"],
            run["memory"],
        )
        height, width, channels = held.images.shape[1:]
        source = FacesSource(faces, size=(height, width), grayscale=channels == 1, workers=workers)
        domains = [faces]
    sets = (f"{len(d)} images of {len(d.identities)} people from {d.source}" for d in domains)
    console.print(
        f"{', mixed with '.join(sets)}; "
        f"{len(held.identities)} people held out; run folder {folder}",
        highlight=False,
        markup=False,
    )
    if starts["init"]:
        found, state = state_of(starts["init"])
        say(f"the run {inherited(found, state['data'].get('identities', 0), source.num_classes)}")
    pixels = verify_pixels(held) if held.identities else None  # an error, if any, before training
    with interrupts(f"synface train --resume {folder} goes on"), Bar("training") as bar:
        result = train(
            config,
            source,
            folder,
            **starts,
            prolong=resume is not None,
            progress=bar,
            command=run,
            verify=(lambda network: figures(verify_network(network, held))) if pixels else None,
            verify_every=verify_every,
            device=rank.device,
        )
    if result.timing is not None:
        console.print(
            "{samples_per_s:.0f} {what}/s{where}; {workers} workers, {decode_share:.1%} of their "
            "time spent on decoding; {wait_share:.1%} of the time spent on waiting for "
            "them".format(
                **result.timing,
                what="images" if isinstance(source, FacesSource) else "pairs of images",
                where=f" on the first of {rank.ranks} ranks" if rank.ranks > 1 else "",
            ),
            highlight=False,
        )
    if pixels is not None and rank.leads:
        print_verification(verify_network(result.backbone, held), pixels, held)
        console.print(
            f"synface eval {folder} verifies this run again", highlight=False, markup=False
        )


def _refuse_idle(context: typer.Context, run: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError for an option that the others keep from having any effect."""
    if run["synthetic"] or run["real"]:
        refuse(context, "with --synthetic and --real: they are decoded while it trains", "memory")
    else:
        refuse(context, "without --synthetic and --real", "mix_ratio", "per_sample")
    if config.schedule != "polynomial":
        refuse(context, f"with --schedule {config.schedule}", "power")
    if not run["holdout"]:
        refuse(context, "with --holdout 0: there is nobody to verify on", "verify_every")


def _image_size(run: dict[str, Any]) -> tuple[int, int]:
    """(H, W) of the images that a command trains on."""
    embedded = run["synthetic"] == EMBEDDED or not (run["data"] or run["real"])
    return parse_size(run["size"]) or (EMBEDDED_SIZE if embedded else FOLDER_SIZE)


def _stored_run(
    context: typer.Context, folder: Path, given: dict[str, Any]
) -> tuple[dict[str, Any], TrainConfig]:
    """Return how a run was started; raise unless the options given now agree with it.

    More epochs may be given, and other places of the images, which `train` holds against the run's
    fingerprint.
    """
    from ..training.model import CONFIG

    run, config = command_of(folder / CONFIG)
    stored = run | asdict(config)
    stored |= {name: _joined(stored[name]) for name in ("widths", "depths")}
    for name, value in context.params.items():
        if name not in stored or not is_given(context, name):
            continue
        value = given.get(name, value)
        if name in PLACES and stored[name] is not None:
            run[name] = value
        elif name == "epochs" and value > stored[name]:
            config = replace(config, epochs=value)
        elif stored[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} differs from the run's {stored[name]}: "
                "a resumed run keeps its configuration"
                + (", but for more epochs" if name == "epochs" else "")
            )
    for name in PLACES:
        run[name] = place(folder, name, run[name])
    return run, config
