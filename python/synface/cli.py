"""The command line: synface convert, pack, synthesize, train, eval, plan, bench, demo, info."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from . import bench, checkpoint, packing
from .check import check_device
from .data import Faces, convert, embedded_faces, open_images, read_folder
from .data.images import FORMATS
from .data.loader import Domain, common_shape, opened
from .embeddings import read_embeddings
from .evaluate import Verification, embed, pixel_embeddings, verify
from .generate import open_generator
from .mixing import Beta, Constant, Grid, Ratio
from .ranks import joined
from .recipes import cli as recipes
from .settings import check_keys, read_toml
from .sources import FacesSource, MixedSource, fingerprint
from .synthesize import synthesize
from .train import CONFIG, TrainConfig, load_backbone, train
from .verification_sets import PairSet, TemplateSet, open_set

if TYPE_CHECKING:
    from .plan import Plan

app = typer.Typer(
    help="Face recognition on synthetic and real faces, over the fused ops of synface_kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(recipes.app, name="recipe")
app.command("study")(recipes.study_command)
console = Console()
DEFAULT = TrainConfig()
EMBEDDED = "default"  # as a folder: the embedded faces
# What config.json holds of how a run was started, and what one means that was written earlier.
TEXT: tuple[type, ...] = (str, type(None))
COMMAND: dict[str, tuple[type, ...]] = {
    "data": TEXT,
    "synthetic": TEXT,
    "real": TEXT,
    "mix_ratio": (str,),
    "per_sample": (bool,),
    "holdout": (int,),
    "size": TEXT,
    "relabel": (bool,),
    "memory": (int,),
}
EARLIER = {
    "synthetic": None,
    "real": None,
    "mix_ratio": "grid",
    "per_sample": False,
    "relabel": False,
    "memory": 3 << 13,  # all that was trained on, were it grey
}
MEMORY = 1024  # MiB
FOLDER_SIZE = (56, 48)  # height, width: what two cores train in a minute or two

DataOption = Annotated[
    Path | None,
    typer.Option(
        help="Image folder, one sub-folder per identity; or RecordIO, WebDataset shards, Parquet, "
        "a folder of Hugging Face datasets. "
        "Default: the 100 real faces that scikit-image ships, with style variation."
    ),
]
RelabelOption = Annotated[
    bool,
    typer.Option(
        "--relabel", help="Number the labels that have images from 0 on; else gaps are an error."
    ),
]
HoldoutOption = Annotated[
    int, typer.Option(help="Identities (the last ones) kept for verification.", min=0)
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="Height×width in pixels, such as 112x112. "
        "Default: 56x48 for a folder, 48x48 for the embedded faces."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of everything random.", min=0)]


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Values of a TOML file, for options that the command line does not give."""
    if file is not None:
        values = read_toml(file)
        check_keys(
            file, values, [p.name for p in context.command.params if p.name != "config_file"]
        )
        context.default_map = {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in values.items()
        }
    return file


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of options, by their names with _ for -, such as a run's config.toml; "
        "the command line goes before it.",
        is_eager=True,
        callback=_from_file,
    ),
]


class Bar:
    """A rich progress bar with images/s and loss."""

    def __init__(self, description: str, done: ProgressColumn | None = None) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            done or MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),  # 80 columns hold no more
            console=console,
        )
        self.task = self.progress.add_task(escape(description), total=None, note="")
        self.images, self.began = 0, time.perf_counter()
        self.before: int | None = None  # files that were there at the first call

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, total_steps: int, step: int) -> None:
        self.progress.update(self.task, total=total_steps, completed=step)

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.images += images
        rate = self.images / (time.perf_counter() - self.began)
        note = f"loss {loss:.2f}, top-1 {accuracy:.0%}, {rate:.0f} images/s"
        self.progress.update(self.task, advance=1, note=note)

    def files(self, done: int, total: int) -> None:
        if self.before is None:
            self.before, self.began = done, time.perf_counter()
        rate = (done - self.before) / max(1e-9, time.perf_counter() - self.began)
        self.progress.update(self.task, total=total, completed=done, note=f"{rate:.0f} images/s")

    def advance(self, note: str) -> None:
        self.progress.update(self.task, advance=1, note=note)


class PackingBar(Bar):
    """A share done, the worst cosine, how far it is above the bound, and the time left."""

    def __init__(self, objective: str, bound: float) -> None:
        super().__init__(f"packing, {objective}", TaskProgressColumn())
        self.bound = bound

    def __enter__(self) -> PackingBar:
        super().__enter__()
        return self

    def update(self, done: float, seconds: float, worst: float | None) -> None:
        note = "" if worst is None else f"worst {worst:.4f}, bound + {worst - self.bound:.4f}"
        self.progress.update(self.task, total=1.0, completed=done, note=note)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 112x112, got {text!r}")
    return int(parts[0]), int(parts[1])


def _faces(
    data: Path | None,
    size: tuple[int, int] | None,
    grey: bool | None = None,
    relabel: bool = False,
) -> Faces:
    if data is None:
        if size is not None and size[0] != size[1]:
            raise ValueError(f"the embedded faces are square, got --size {size[0]}x{size[1]}")
        return embedded_faces(size=size[0]) if size else embedded_faces()
    with Bar(f"reading {data}") as bar:
        images = open_images(data, relabel)
        return read_folder(images, size or FOLDER_SIZE, grey, progress=bar.files)


def _split(
    data: Path | None,
    size: tuple[int, int] | None,
    grey: bool | None,
    relabel: bool,
    holdout: int,
    memory: int,
) -> tuple[Domain, Faces]:
    """The faces to train on, and the last ones, held out.

    The former are in memory too if all, as RGB, take at most so many MiB.
    """
    images = open_images(data, relabel) if data else None
    size = size or (FOLDER_SIZE if images else None)
    if images is None or size is None or 3 * math.prod(size) * len(images) <= memory << 20:
        return _faces(data, size, grey, relabel).split(holdout)
    height, width, channels = common_shape(opened(data=images), size, grey)
    rest, held = images.split(holdout)
    with Bar(f"reading {data}") as bar:
        return rest, read_folder(held, (height, width), channels == 1, progress=bar.files)


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be integers such as 16,32,64, got {text!r}") from None


def _ratio(text: str) -> Ratio:
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
    if not (run["synthetic"] and run["real"]) or run["data"]:
        raise ValueError("--synthetic and --real go together, without --data")
    embedded, size = run["synthetic"] == EMBEDDED, _size(run["size"])
    if not embedded and Path(run["synthetic"]).resolve() == Path(run["real"]).resolve():
        raise ValueError(f"--synthetic and --real are the same folder, {run['real']}")
    real, held = open_images(run["real"], run["relabel"]).split(run["holdout"])
    source = MixedSource(
        _faces(None, size) if embedded else open_images(run["synthetic"], run["relabel"]),
        real,
        ratio=_ratio(run["mix_ratio"]),
        per_sample=run["per_sample"],
        size=size or (None if embedded else FOLDER_SIZE),
        workers=workers,
    )
    height, width, channels = source.image_shape
    with Bar(f"reading {held.source}") as bar:
        return source, read_folder(held, (height, width), channels == 1, progress=bar.files)


def _verify_network(backbone: torch.nn.Module, held: Faces) -> Verification:
    return verify(embed(backbone, held.images), held.labels)


def _figures(found: Verification) -> dict[str, float]:
    numbers = {"auc": found.auc, "accuracy": found.accuracy}
    numbers |= {f"tar_at_far_{far:g}": tar for far, tar in found.tar.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _verify_pixels(held: Faces) -> Verification:
    try:
        return verify(pixel_embeddings(held.images), held.labels)
    except ValueError as error:
        raise ValueError(
            f"{len(held)} images of {len(held.identities)} people cannot be verified on "
            f"({error}): hold out more, or none (--holdout 0)"
        ) from error


def _print_verification(
    trained: Verification, pixels: Verification, held: Faces, unseen: bool = True
) -> None:
    mean_image = held.images.double().mean(0)
    centred = verify(pixel_embeddings(held.images, mean_image), held.labels)
    people = f"{len(held.identities)} people" + (" never trained on" if unseen else "")
    console.print(f"\nverification on {people} ({len(held)} images)", highlight=False)
    console.print(f"[bold]trained network[/bold]\n{trained.summary()}", highlight=False)
    console.print(f"[bold]raw pixels, centred cosine[/bold]\n{pixels.summary()}", highlight=False)
    console.print(
        f"ROC-AUC: trained [bold]{trained.auc:.4f}[/bold], raw pixels {pixels.auc:.4f} "
        f"({centred.auc:.4f} with these people's mean image taken off)\n",
        highlight=False,
    )


@app.command("train")
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
        Path | None, typer.Option(help="Go on with the run in this folder, as it was configured.")
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
        bool, typer.Option("--freeze-statistics", help="Normalise by the running statistics.")
    ] = DEFAULT.freeze_statistics,
    sample_rate: Annotated[
        float, typer.Option(help="Share of the classes that take part in a step (Partial FC).")
    ] = DEFAULT.sample_rate,
    fused_update: Annotated[
        bool,
        typer.Option(
            "--fused-update", help="The backward pass steps the centres: no gradient of theirs."
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
    given = context.params | {"widths": _numbers("--widths", widths)}
    given["depths"] = _numbers("--depths", depths)
    run: dict[str, Any] = {
        "data": str(data) if data else None,
        "synthetic": synthetic,
        "real": str(real) if real else None,
        "mix_ratio": mix_ratio,
        "per_sample": per_sample,
        "holdout": holdout,
        "size": size,
        "relabel": relabel,
        "memory": memory,
    }
    names = {f.name for f in fields(TrainConfig)} & given.keys()
    config = TrainConfig(**{name: given[name] for name in names})
    if resume is not None:
        run, config = _stored_run(context, resume)
        output = resume
    rank = context.with_resource(joined(device))
    console.quiet = not rank.leads
    folder = output or rank.agreed(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    source: FacesSource | MixedSource
    if run["synthetic"] or run["real"]:
        source, held = _mixed(run, workers)
        domains = [source.synthetic, source.real]
    else:
        faces, held = _split(
            Path(run["data"]) if run["data"] else None,
            _size(run["size"]),
            None,
            run["relabel"],
            run["holdout"],
            run["memory"],
        )
        height, width, channels = held.images.shape[1:]
        source = FacesSource(faces, size=(height, width), grey=channels == 1, workers=workers)
        domains = [faces]
    sets = (f"{len(d)} images of {len(d.identities)} people from {d.source}" for d in domains)
    console.print(
        f"{', mixed with '.join(sets)}; "
        f"{len(held.identities)} people held out; run folder {folder}",
        highlight=False,
        markup=False,
    )
    pixels = _verify_pixels(held) if held.identities else None  # an error, if any, before training
    try:
        with Bar("training") as bar:
            result = train(
                config,
                source,
                folder,
                resume=resume is not None,
                progress=bar,
                command=run,
                verify=(lambda network: _figures(_verify_network(network, held)))
                if pixels
                else None,
                verify_every=verify_every,
                tensorboard=tensorboard,
                device=rank.device,
            )
    except KeyboardInterrupt:
        console.print(
            f"interrupted: synface train --resume {folder} goes on",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
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
        _print_verification(_verify_network(result.backbone, held), pixels, held)
        console.print(
            f"synface eval {folder} verifies this run again", highlight=False, markup=False
        )


def _stored_run(context: typer.Context, folder: Path) -> tuple[dict[str, Any], TrainConfig]:
    """How the run was started; options given now must agree with it."""
    run, config = _command(folder / CONFIG)
    stored = run | asdict(config)
    stored |= {name: _joined(stored[name]) for name in ("widths", "depths")}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)  # click's enum, which typer may vendor
        value = str(value) if isinstance(value, Path) else value
        explicit = source is not None and source.name == "COMMANDLINE"
        if explicit and name in stored and stored[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} differs from the run's {stored[name]}: "
                "a resumed run keeps its configuration"
            )
    return run, config


def _command(file: Path) -> tuple[dict[str, Any], TrainConfig]:
    """How a run was started, as `train_command` has it, and its configuration."""
    try:
        started = json.loads(file.read_text())
        config = TrainConfig.from_json(started["config"])
        run = EARLIER | started["command"]
        if run.keys() != COMMAND.keys() or not all(isinstance(run[k], COMMAND[k]) for k in run):
            raise TypeError(f"its command is {run}")
    except OSError as error:
        raise ValueError(
            f"{file.parent} holds no run to resume: {file}: {error.strerror}"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return run, config


@app.command("eval")
def eval_command(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, or one checkpoint's.", show_default=False)
    ] = None,
    checkpoint_: Annotated[
        Path | None, typer.Option("--checkpoint", help="The same, as an option.")
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
        typer.Option("--resize", help="With --set: resize images; else another size is an error."),
    ] = False,
    flip: Annotated[
        bool, typer.Option(help="With --set: add the embedding of the mirror image.")
    ] = True,
    device: Annotated[str, typer.Option(help="With --set: where the network runs.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="With --set: images at once.", min=1)] = 256,
    output: Annotated[
        Path | None, typer.Option(help="With --set: folder of the report (table, curves, JSON).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Image folder. Default: the one that the run trained on.")
    ] = None,
    holdout: Annotated[
        int | None,
        typer.Option(
            help="Verify on this many last identities; 0: on all. Default: as in training, or "
            "all where --data is given.",
            min=0,
        ),
    ] = None,
    relabel: RelabelOption = False,
) -> None:
    """Verify a trained network on pairs of images, beside raw pixels, or on verification sets."""
    if (run is None) == (checkpoint_ is None):
        raise ValueError("eval needs one run: its folder, or --checkpoint")
    run = run or checkpoint_
    assert run is not None
    backbone, state = load_backbone(run)
    height, width, channels = state["data"]["image_shape"]
    if sets:
        if data is not None or holdout is not None:
            raise ValueError("--set goes without --data and --holdout")
        backbone.to(check_device(device))
        _evaluate_sets(
            backbone,
            [open_set(path, images) for path in sets],
            (height, width, channels),
            {"run": str(run), "step": state["step"], "flip": flip, "device": device},
            output,
            batch_size=batch_size,
            flip=flip,
            resize=resize,
        )
        return
    memory = MEMORY
    if data is None:
        command = _command(checkpoint.find(run).parent.parent / CONFIG)[0]
        trained_on = command["real"] or command["data"]
        data = Path(trained_on) if trained_on else None
        holdout = command["holdout"] if holdout is None else holdout
        relabel, memory = command["relabel"], command["memory"]
    rest: Domain | None = None
    if holdout:
        rest, held = _split(data, (height, width), channels == 1, relabel, holdout, memory)
    else:
        held = _faces(data, (height, width), channels == 1, relabel)
    if held.images.shape[3] != channels:
        raise ValueError(
            f"{run} was trained on images of {channels} channels, {held.source} has "
            f"{held.images.shape[3]}"
        )
    # Only the split of the training run itself proves that these people are new to the network.
    prints = [fingerprint(rest)] if rest is not None else []
    if isinstance(rest, Faces) and data is not None:  # as a mixed run knows it
        prints.append(fingerprint(open_images(data, relabel).split(holdout or 0)[0]))
    unseen = state["data"]["fingerprint"].split()[-1] in prints
    pixels = _verify_pixels(held)
    _print_verification(_verify_network(backbone, held), pixels, held, unseen)


def _evaluate_sets(
    backbone: torch.nn.Module,
    sets: list[PairSet | TemplateSet],
    image_shape: tuple[int, int, int],
    about: dict[str, Any],
    output: Path | None,
    **options: Any,
) -> None:
    from . import set_report

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
    if output is not None:
        page = set_report.write(output, results, about)
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


@app.command("convert")
def convert_command(
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
    with Bar(f"converting {source}") as bar:
        written = convert(
            source,
            destination,
            to,
            relabel=relabel,
            shard_bytes=shard_size << 20,
            progress=bar.files,
        )
    console.print(
        f"{destination}: {FORMATS[to].title}; {len(written):,} images of "
        f"{len(written.identities):,} identities",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command("pack")
def pack_command(
    count: Annotated[int | None, typer.Option(help="Points N.")] = None,
    dim: Annotated[int | None, typer.Option(help="Dimensions d.")] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="lse, hyperface or langevin; give several to run one after the other. "
            "The first one's points go to --output. Default: lse."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of each objective and restart. Default: 500.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of each objective, in place of --steps.")
    ] = None,
    restarts: Annotated[
        int, typer.Option(help="Runs from other random points; the best wins.")
    ] = 1,
    batch: Annotated[
        int | None,
        typer.Option(help="Points per step, drawn at random; for N too large for all at once."),
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option(help="Embeddings to stay close to: .safetensors or .npy.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Weight of the gallery.")] = 0.5,
    start: Annotated[
        Path | None, typer.Option(help="Embeddings to start from: .safetensors or .npy.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of hyperface.")] = 0.001,
    seed: SeedOption = 0,
    output: Annotated[
        Path, typer.Option(help="The points, a .safetensors file; beside it a .png.")
    ] = Path("packed.safetensors"),
    device: str = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="Pack nothing: find the worst pair of these embeddings, exactly."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With --check: pairs of one embedding from each file.")
    ] = None,
) -> None:
    """Spread N unit vectors in d dimensions as far apart as they go, or check embeddings."""
    if check is not None:
        _check_embeddings(check, against)
        return
    if against is not None:
        raise ValueError("--against needs --check")
    begin = None if start is None else read_embeddings(start)
    keep = None if gallery is None else read_embeddings(gallery)
    if begin is not None:
        count = begin.shape[0] if count is None else count
        dim = begin.shape[1] if dim is None else dim
    if count is None or dim is None:
        raise ValueError("pack needs --count and --dim (or --start), or --check")
    packers = [
        packing.Packer(
            packing.PackConfig(count, dim, each, steps, minutes, restarts, batch, alpha, lr, seed),
            gallery=keep,
            start=begin,
            device=device,
        )
        for each in objective or ["lse"]
    ]
    bound = packers[0].bound
    console.print(
        f"{count:,} points in {dim} dimensions: random ones have a worst cosine of about "
        f"{packing.bounds.random_worst(count, dim):.4f}, none can have less than "
        f"{bound.cosine:.4f} ({bound.name})",
        highlight=False,
        soft_wrap=True,
    )
    try:
        packings = packing.pack(
            packers,
            output,
            resume=resume,
            overwrite=overwrite,
            progress=lambda each: PackingBar(each, bound.cosine),
        )
    except KeyboardInterrupt:
        console.print("interrupted: the same command with --resume goes on", highlight=False)
        raise typer.Exit(130) from None
    for each in packings:
        seconds, number, _ = each.history[-1]
        console.print(
            f"{each.config.objective}: worst cosine {each.worst:.6f} (points {each.pair[0]} and "
            f"{each.pair[1]}), {each.gap:.6f} above the bound; {number:,} steps, {seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"written: {output}, {output.with_suffix('.png')}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _check_embeddings(file: Path, against: Path | None) -> None:
    rows = read_embeddings(file)
    other = None if against is None else read_embeddings(against)
    if other is not None and rows.shape[1] != other.shape[1]:
        raise ValueError(
            f"{file} and {against} must have the same dimension, got {rows.shape[1]} and "
            f"{other.shape[1]}"
        )
    if other is None and len(rows) < 2:
        raise ValueError(f"{file} must have two rows or more, got {len(rows)}")
    cosine, (i, j) = packing.closest_pair(rows, other)
    console.print(
        f"worst cosine {cosine:.6f}: row {i} of {file} and row {j} of {against or file}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if other is None and rows.shape[1] > 1:
        count, dim = rows.shape
        bound = packing.bounds.best(count, dim)
        console.print(
            f"{count:,} points in {dim} dimensions: bound {bound.cosine:.6f} ({bound.name}), "
            f"random points about {packing.bounds.random_worst(count, dim):.6f}",
            highlight=False,
            soft_wrap=True,
        )


@app.command("synthesize")
def synthesize_command(
    packed: Annotated[
        Path, typer.Option(help="Embeddings (N, D), one identity per row: .safetensors or .npy.")
    ],
    output: Annotated[Path, typer.Option(help="The image folder to write.")],
    images_per_identity: Annotated[int, typer.Option(min=1)] = 20,
    generator: Annotated[
        Path | None,
        typer.Option(
            help="ONNX (.onnx) or TorchScript file; the latter is a program that is run: trust "
            "who wrote it. Default: eigenfaces of the faces that scikit-image ships."
        ),
    ] = None,
    style_size: Annotated[
        int | None, typer.Option(help="Of the generator's style, where its file does not say it.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of the eigenfaces' images, such as 112x112. Default: 48x48."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the styles.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per call of the generator.")] = 64,
    workers: Annotated[
        int | None, typer.Option(help="Threads that encode. Default: one per core.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where a generator's file runs.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Make what is missing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what was synthesized before.")
    ] = False,
) -> None:
    """Write a folder of face images, some of each packed identity, that `train` takes."""
    embeddings = read_embeddings(packed)
    asked = _size(size)
    if asked is not None and asked[0] != asked[1]:
        raise ValueError(f"the eigenfaces are square, got --size {size}")
    faces = open_generator(
        generator,
        embeddings.shape[1],
        style_size=style_size,
        size=asked[0] if asked else None,
        device=device,
    )
    began = time.perf_counter()
    try:
        with Bar("synthesizing") as bar:
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
    except KeyboardInterrupt:
        console.print("interrupted: the same command with --resume makes the rest", highlight=False)
        raise typer.Exit(130) from None
    seconds = time.perf_counter() - began
    console.print(
        f"{len(embeddings)} identities, {images_per_identity} images of each in {output}: "
        f"{made} made, {made / seconds:.0f} images/s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command("plan")
def plan_command(
    identities: Annotated[str, typer.Option(help="How many: 250000, 10M, 1.5B.")],
    dim: Annotated[int, typer.Option(help="Of the embeddings.", min=1)] = 512,
    gpus: Annotated[int, typer.Option(help="The classes are spread over them.", min=1)] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of each: 80GB, 24GiB. Default: the device's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of a step, on all GPUs together.")] = 1024,
    labels: Annotated[int, typer.Option(help="Per image; mixing gives up to 3.", min=1)] = 1,
    sample_rate: Annotated[
        float, typer.Option(help="Share of the classes that take part in a step.", max=1.0)
    ] = 1.0,
    fused_update: Annotated[
        bool, typer.Option("--fused-update", help="The backward pass steps the centres.")
    ] = False,
    centers: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    optimizer: Annotated[str, typer.Option(help="Of the centres: sgd, adamw or none.")] = "sgd",
    backbone: Annotated[
        str, typer.Option(help="r18, r34, r50 or r100 at 112x112; none leaves it out.")
    ] = "r50",
    precision: Annotated[str, typer.Option(help="Of the backbone: bfloat16 or float32.")] = (
        "bfloat16"
    ),
    device: Annotated[str, typer.Option(help="a100, h100, h200 or rtx4090.")] = "h100",
    measured: Annotated[
        Path | None,
        typer.Option(help="What make gpu-evidence wrote on that device: its rates are taken."),
    ] = None,
) -> None:
    """What training would take: memory per GPU, bytes exchanged, time per step; what to change."""
    from . import plan

    if device not in plan.DEVICES:
        raise ValueError(f"--device must be one of {', '.join(plan.DEVICES)}, got {device!r}")
    settings = plan.Settings(
        identities=plan.parse_count("--identities", identities),
        dim=dim,
        gpus=gpus,
        gpu_memory=(
            plan.DEVICES[device].memory
            if gpu_memory is None
            else plan.parse_bytes("--gpu-memory", gpu_memory)
        ),
        batch=batch,
        labels=labels,
        sample_rate=sample_rate,
        fused_update=fused_update,
        centers=centers,
        optimizer=optimizer,
        backbone=None if backbone == "none" else backbone,
        precision=precision,
        device=device,
    )
    _print_plan(plan.plan(settings, None if measured is None else plan.read_measured(measured)))


def _print_plan(found: Plan) -> None:
    def show(title: str, unit: str, rows: list[tuple[str, ...]]) -> None:
        table = Table(title, unit, *(["bound by"] if len(rows[0]) > 2 else []))
        table.columns[1].justify = "right"
        for row in rows:
            table.add_row(*row)
        console.print(table)

    s = found.settings
    console.print(
        f"{s.identities:,} identities × {s.dim}, {s.centers}, on {s.gpus} × {s.device}: "
        f"{s.classes:,} classes a GPU, {s.sampled:,} of them in a step; batch {s.batch:,}, "
        f"{s.images:,} images a GPU",
        highlight=False,
    )
    memory = [(name, f"{size / 2**30:.2f}") for name, size in found.memory.items()]
    show("memory of a GPU", "GiB", [*memory, ("together", f"{found.total / 2**30:.2f}")])
    if s.gpus > 1:
        sent = [(name, f"{size / 1e6:.2f}") for name, size in found.exchange.items()]
        total = sum(found.exchange.values())
        show("sent by a GPU in a step", "MB", [*sent, ("together", f"{total / 1e6:.2f}")])
    parts = [
        (name, f"{1e3 * part.seconds:.2f}", part.bound + (", measured" if part.measured else ""))
        for name, part in found.time.items()
    ]
    rate = s.batch / found.seconds
    together = ("together", f"{1e3 * found.seconds:.2f}", f"{rate:,.0f} images/s")
    show("time of a step, at least", "ms", [*parts, together])
    console.print(f"rates: {found.rates}", highlight=False)
    room = f"{found.available / 2**30:.1f} GiB ({s.gpu_memory / 2**30:.1f} less 5 %)"
    if found.fits:
        console.print(f"[green]It fits[/green] into {room}.", highlight=False)
        return
    console.print(f"[red]It does not fit[/red] into {room}. What would change that:")
    for remedy in found.remedies:
        outcome = "[green]fits[/green]" if remedy.fits else "not enough alone"
        console.print(
            f"  {escape(remedy.change)}: {remedy.bytes / 2**30:.1f} GiB, {outcome}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def info() -> None:
    """Versions, devices, and which implementation each op takes."""
    from synface_kernels import _env

    console.print(_env.report(), highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The report's folder.")] = Path("synface-report"),
    seed: SeedOption = 0,
    epochs: int = 12,
    identities: Annotated[int, typer.Option(help="Of the 100 embedded.", min=4, max=100)] = 100,
    images: Annotated[int, typer.Option(help="Per identity.", min=2)] = 20,
    classes: Annotated[int, typer.Option(help="C of the measured softmax.", min=2)] = 100_000,
) -> None:
    """Train on real faces, verify on others, measure the fused softmax; write a report."""
    import tempfile

    import synface_kernels as sk
    from synface_kernels import _env

    from . import measure, report

    began = time.perf_counter()
    faces = embedded_faces(images_per_identity=images, identities=identities, seed=seed)
    held_out = max(2, identities // 5)
    learn, held = faces.split(held_out)
    console.print(
        f"1. {faces.source}\n   training on {len(learn.identities)} people, verifying on the "
        f"{held_out} others",
        highlight=False,
    )
    config = TrainConfig(epochs=epochs, seed=seed, checkpoint_every=max(1, epochs))
    with tempfile.TemporaryDirectory() as folder, Bar("   training") as bar:
        result = train(config, learn, Path(folder) / "run", progress=bar)
    trained, pixels = _verify_network(result.backbone, held), _verify_pixels(held)
    _print_verification(trained, pixels, held)

    work = measure.Workload(c=classes)
    console.print(
        f"2. the margin softmax over {work.c:,} identities: N={work.n}, D={work.d}, float32",
        highlight=False,
    )
    with Bar("   measuring") as bar:
        bar.start(len(measure.METHODS) * 5, 0)
        memory: dict[str, Any] = {}
        for method in measure.METHODS:
            memory[method] = measure.peak_memory(method, work)
            bar.advance(f"memory of {method}")
        times = measure.time_all(work, 3, lambda method: bar.advance(f"time of {method}"))
    implementation = f"impl={sk.explain('margin_cross_entropy').impl}"
    header, *rows = report.softmax_table(times, memory, implementation)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)

    seconds = time.perf_counter() - began
    page = report.write(
        output,
        faces=faces,
        history=result.history,
        trained=trained,
        pixels=pixels,
        workload=work,
        times=times,
        memory=memory,
        implementation=implementation,
        machine=f"{_env.processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        seconds=seconds,
    )
    console.print(f"3. report: {page} ({seconds:.0f} s in all)", highlight=False)


def main() -> None:
    """Runs the command line; an error that the user can act on is one line, without a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError) as error:
        console.quiet = False
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
