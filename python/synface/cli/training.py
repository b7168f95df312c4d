"""synface train, eval."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..check import check_folder
from ..data import open_images
from ..extras import extra
from ..textfiles import read_json
from ..train_config import TrainConfig
from ..verification_sets import PairSet, TemplateSet, open_set
from .options import (
    ConfigOption,
    DataOption,
    HoldoutOption,
    RelabelOption,
    SeedOption,
    SizeOption,
    parse_size,
    refuse,
)
from .terminal import Bar, console, interrupts, say

if TYPE_CHECKING:  # they import torch, which takes longer than all else that --help needs
    import torch

    from ..data import Faces, ImageSet
    from ..data.loader import Domain
    from ..mixing import Ratio
    from ..set_report import SetResult
    from ..sources import MixedSource

DEFAULT = TrainConfig  # its class attributes
EMBEDDED = "default"  # as a folder: the embedded faces
PLACES = ("data", "synthetic", "real")  # options that say where images are
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
    "init": TEXT,
}
EARLIER = {
    "init": None,
    "synthetic": None,
    "real": None,
    "mix_ratio": "grid",
    "per_sample": False,
    "relabel": False,
    "memory": 3 << 13,  # all that was trained on, were it grey
}
MEMORY = 1024  # MiB
FOLDER_SIZE = (56, 48)  # height, width: what two cores train in a minute or two
EMBEDDED_SIZE = (48, 48)  # of the embedded faces, unless --size says otherwise


def _faces(
    data: Path | None,
    size: tuple[int, int] | None,
    grey: bool | None = None,
    relabel: bool = False,
    memory: int = 8 << 10,  # MiB
) -> Faces:
    from ..data import embedded_faces, read_folder

    if data is None:
        if size is not None and size[0] != size[1]:
            raise ValueError(f"the embedded faces are square, got --size {size[0]}x{size[1]}")
        return embedded_faces(size=size[0]) if size else embedded_faces()
    with Bar(f"reading {data}") as bar:
        images = open_images(data, relabel)
        size = size or FOLDER_SIZE
        return read_folder(images, size, grey, memory_limit=memory << 20, progress=bar.files)


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
    from ..data import read_folder
    from ..data.loader import common_shape, opened

    images = open_images(data, relabel) if data else None
    size = size or (FOLDER_SIZE if images else None)
    if images is None or size is None or 3 * math.prod(size) * len(images) <= memory << 20:
        return _faces(data, size, grey, relabel, max(memory, 1)).split(holdout)
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
    from ..mixing import Beta, Constant, Grid

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
    from ..sources import MixedSource

    if not (run["synthetic"] and run["real"]) or run["data"]:
        raise ValueError("--synthetic and --real go together, without --data")
    embedded, size = run["synthetic"] == EMBEDDED, parse_size(run["size"])
    ratio = _ratio(run["mix_ratio"])
    if not embedded and Path(run["synthetic"]).resolve() == Path(run["real"]).resolve():
        raise ValueError(f"--synthetic and --real are the same folder, {run['real']}")
    real, held = open_images(run["real"], run["relabel"]).split(run["holdout"])
    source = MixedSource(
        _faces(None, size) if embedded else open_images(run["synthetic"], run["relabel"]),
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
    from ..ranks import joined
    from ..runs import check_start, inherited, state_of
    from ..sources import FacesSource
    from ..train import train
    from .verification import figures, print_verification, verify_network, verify_pixels

    given = context.params | {"widths": _numbers("--widths", widths)}
    given["depths"] = _numbers("--depths", depths)
    run: dict[str, Any] = {
        "data": _absolute(data),
        "synthetic": _absolute(synthetic),
        "real": _absolute(real),
        "mix_ratio": mix_ratio,
        "per_sample": per_sample,
        "holdout": holdout,
        "size": size,
        "relabel": relabel,
        "memory": memory,
        "init": _absolute(init),
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
        faces, held = _split(
            Path(run["data"]) if run["data"] else None,
            parse_size(run["size"]),
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


def _absolute(path: Path | str | None) -> str | None:
    """A path as a run's folder keeps it, which may be resumed from any directory."""
    return path if path is None or path == EMBEDDED else os.path.abspath(path)


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
    from ..runs import CONFIG

    run, config = _command(folder / CONFIG)
    stored = run | asdict(config)
    stored |= {name: _joined(stored[name]) for name in ("widths", "depths")}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)  # click's enum, which typer may vendor
        explicit = source is not None and source.name == "COMMANDLINE"
        if not explicit or name not in stored:
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
        run[name] = _place(folder, name, run[name])
    return run, config


def _place(folder: Path, name: str, path: str | None, option: str | None = None) -> str | None:
    """Return the absolute path of a run's images; raise ValueError where nothing is there."""
    path = _absolute(path)
    if path not in (None, EMBEDDED) and not Path(path).exists():
        raise ValueError(
            f"{folder}: its images (--{name}) are not at {path} now: say where they are with "
            f"--{option or name}"
        )
    return path


def _command(file: Path) -> tuple[dict[str, Any], TrainConfig]:
    """How a run was started, as `train_command` has it, and its configuration."""
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run to resume: there is no {file.name}")
    started = read_json(file)
    try:
        config = TrainConfig.from_json(started["config"])
        run = EARLIER | started["command"]
        if run.keys() != COMMAND.keys() or not all(isinstance(run[k], COMMAND[k]) for k in run):
            raise TypeError(f"its command is {run}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return run, config


def eval_command(
    context: typer.Context,
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
    from ..runs import CONFIG, load_backbone
    from ..set_report import SetResult
    from ..sources import fingerprint
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
        with extra("train", "drawing figures"):  # raises before the verification, not after it
            import matplotlib.figure  # noqa: F401
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
        command = _command(config)[0]
        memory = command["memory"]
    if data is None:
        name = "real" if command["real"] else "data"
        trained_on = _place(run, name, command[name], "data")
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
            rest, held = _split(data, (height, width), channels == 1, relabel, holdout, memory)
        else:
            held = _faces(data, (height, width), channels == 1, relabel)
        if held.images.shape[3] != channels:
            raise ValueError(
                f"{run} was trained on images of {channels} channels, {held.source} has "
                f"{held.images.shape[3]}"
            )
        # Only the split of the run itself proves that these people are new to the network.
        prints = [fingerprint(rest)] if rest is not None else []
        if isinstance(rest, Faces) and data is not None:  # as a mixed run knows it
            prints.append(fingerprint(open_images(data, relabel).split(holdout or 0)[0]))
        unseen = state["data"]["fingerprint"].split()[-1] in prints
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

    from ..check import check_device

    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    return check_device(cuda if name == "auto" else name)


def _report(output: Path | None, results: Sequence[SetResult], about: dict[str, Any]) -> None:
    from .. import set_report

    if output is not None:
        say(f"report: {set_report.write(output, results, about)}")


def _may_be(images: ImageSet, command: dict[str, Any], trained_on: dict[str, Any]) -> bool:
    """Return whether these may be a run's images, as far as that shows without decoding any."""
    from ..sources import fingerprint

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
    from .. import set_report

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
