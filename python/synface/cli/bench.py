"""The commands `synface bench scale`, `codes`, `compare` and `training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.check import check_folder
from ..common.interrupts import Terminated
from .options import DeviceOption, SeedOption, chosen_device, is_given, parse_size, refuse
from .terminal import Bar, Group, PackingBar, interrupts, say

app = typer.Typer(cls=Group, help="Measure the library on this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure the library on this machine."""


@app.command("scale")
def scale_command(
    context: typer.Context,
    identities: Annotated[
        str, typer.Option(help="Number of class centers C, such as 10M.")
    ] = "10M",
    dim: Annotated[int, typer.Option(help="Number of dimensions D.")] = 512,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the centers: bfloat16 or float32.")
    ] = "bfloat16",
    sample_rate: Annotated[
        float, typer.Option(help="Share of the centers sampled in a step.")
    ] = 0.01,
    batch: Annotated[int, typer.Option(help="Embeddings per step.")] = 256,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps. Default: 100, unless --minutes is given.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes, instead of --steps.")] = None,
    optimizer: Annotated[str, typer.Option(help="Optimizer of the centers: sgd or adamw.")] = "sgd",
    momentum: Annotated[float, typer.Option(help="SGD momentum; 0 for none.")] = 0.9,
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = 0.02,
    working_set: Annotated[
        str | None,
        typer.Option(help="Number of identities with embeddings. Default: 4096, or C if less."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Folder of memory-mapped centers. Default: in memory.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the files, with a checkpoint at the end.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume with the centers in --directory; keep them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the centers in --directory.")
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: none.", min=1)
    ] = None,
    sync: Annotated[
        bool, typer.Option("--sync", help="Flush checkpoints to disk, to survive a power failure.")
    ] = False,
    seed: SeedOption = 0,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("scale-report"),
) -> None:
    """Train millions of class centers on clustered embeddings; measure time, memory and loss."""
    from ..bench import scale
    from ..bench.plan import parse_count
    from ..common.check import available_memory
    from ..optim.centers import Centers, CentersConfig

    classes = parse_count("--identities", identities)
    config = scale.ScaleConfig(
        CentersConfig(classes, dim, dtype, optimizer, momentum, seed=seed),
        sample_rate=sample_rate,
        batch=batch,
        working_set=min(4096, classes)
        if working_set is None
        else parse_count("--working-set", working_set),
        lr=lr,
    )
    if steps is None and minutes is None:
        steps = 100
    scale.check_length(steps, minutes)
    if directory is None and (keep or resume or overwrite or sync or checkpoint_every):
        raise ValueError(
            "--keep, --resume, --overwrite, --sync and --checkpoint-every need --directory"
        )
    if resume:
        refuse(context, "with --resume", "overwrite")
    if optimizer == "adamw":
        refuse(context, "with --optimizer adamw", "momentum")
    needed, free = sum(config.centers.bytes.values()), available_memory()
    if directory is None and free is not None and needed > free:
        raise ValueError(
            f"{classes:,} centers take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of "
            "memory are free: give a --directory for memory-mapped files"
        )

    check_folder("--output", output)
    if directory is not None:
        check_folder("--directory", directory)
    with Bar("undoing" if resume else "creating") as bar:
        if resume and directory is not None:
            centers = Centers.open(directory, sync=sync, progress=bar.count)
        else:
            centers = Centers.create(
                config.centers, directory, overwrite=overwrite, sync=sync, progress=bar.count
            )
    keep_files = keep or resume
    try:
        with Bar("training") as bar:
            bar.start(steps, centers.step)
            result = scale.run(
                config,
                centers,
                steps=steps,
                minutes=minutes,
                checkpoint_every=checkpoint_every,
                progress=lambda row: bar.step(row["loss"], row["accuracy"], batch),
            )
        scale.write_report(result, output)
        if keep_files:
            centers.checkpoint()
    finally:
        if keep_files:
            centers.close()
        else:
            centers.remove()
    say(scale.summary(result))
    say(f"written: {output / 'scale.json'}, {output / 'scale.png'}")
    if result["ended by"] == "SIGTERM":
        raise Terminated


@app.command("codes")
def codes_command(
    code: Annotated[
        list[str] | None,
        typer.Option(help="Code N,d such as 24,4; may be given several times. Default: all."),
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Take the codes of this dimension only.")] = None,
    seed: SeedOption = 0,
    seeds: Annotated[
        int, typer.Option(help="Number of seeds from --seed on; the best is reported.", min=1)
    ] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("codes-report"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the codes in the report, and add the others.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing report.")
    ] = False,
) -> None:
    """Pack the best known spherical codes with the packer's defaults, and report what it misses."""
    from ..bench.codes import select

    chosen = select(code or [], dim)
    if resume and overwrite:
        raise ValueError("--overwrite has no effect with --resume")
    check_folder("--output", output)

    from ..bench import code_report
    from ..reporting.plots import check_matplotlib
    from ..synthesis.packing import bounds

    check_matplotlib()
    numbers = range(seed, seed + seeds)
    if not (resume or overwrite):
        code_report.check_new(output)
    rows = code_report.read(output, chosen, numbers) if resume else []
    command = "synface bench codes" + "".join(f" --code {each}" for each in code or [])
    command += "" if dim is None else f" --dim {dim}"
    command += f" --seed {seed}" * (seed > 0) + f" --seeds {seeds}" * (seeds > 1)
    done = {(row["count"], row["dim"]) for row in rows}
    page = code_report.write(rows, output, command) if rows else output / "codes.md"
    with interrupts(f"continue with {command} --output {output} --resume"):
        for each in chosen:
            if (each.count, each.dim) in done:
                continue
            bound = bounds.certificate(each.count, each.dim)[0].cosine
            bar = PackingBar(f"{each.count},{each.dim}", bound)
            rows.append(code_report.measure(each, numbers, bar))
            page = code_report.write(rows, output, command)
            say(code_report.summary(rows[-1]))
    say(code_report.conclusion(rows))
    say(f"report: {page}")


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Result file to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Newer result file.")],
    by: Annotated[
        str,
        typer.Option(
            help="Measure of a loss of time: ratio (our time divided by a peer's in the same run, "
            "for machines that others share) or time (for one idle machine)."
        ),
    ] = "ratio",
    tolerance: Annotated[
        float, typer.Option(help="Loss of time or memory that is accepted, as a share.")
    ] = 0.1,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="PEER",
            help="Peer that our times are divided by. Default: the op's floor, such as "
            "'three products', or else the first peer that both files have.",
        ),
    ] = None,
    across_machines: Annotated[
        bool,
        typer.Option(
            "--across-machines",
            help="Compare files of different kinds of machines, which are refused otherwise. "
            "Other versions, threads and instruction sets are only reported.",
        ),
    ] = False,
) -> None:
    """Compare two result files of the benchmarks; exit with 1 if time, memory or a row is lost."""
    from ..bench import compare
    from ..common.check import check_number

    if by not in compare.BY:
        raise ValueError(f"--by must be one of {', '.join(compare.BY)}, got {by!r}")
    check_number("--tolerance", tolerance, 0)
    found = compare.compare(
        compare.read(before),
        compare.read(after),
        reference=reference,
        across_machines=across_machines,
    )
    loses = compare.any_loss(found, by, tolerance)
    doubts = compare.reference_warnings(found, tolerance, chosen=reference is not None)
    for line in [*found.warnings, *(doubts if by == "ratio" else [])]:
        say(f"warning: {line}")
    for line in compare.table(found, by, tolerance):
        say(line)
    for line in found.lost:
        say(f"LOSS: {line}")
    for line in found.uncompared:
        say(f"not compared: {line}")
    say(compare.conclusion(found, by, tolerance))
    if loses:
        raise typer.Exit(1)


@app.command("training")
def training_command(
    context: typer.Context,
    backbone: Annotated[str, typer.Option(help="Backbone, as of `synface train`.")] = "iresnet18",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the images.")] = "112x112",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    identities: Annotated[str, typer.Option(help="Number of class centers of the loops.")] = "10k",
    embedding_size: Annotated[int, typer.Option(help="Dimension of the embeddings.")] = 512,
    classes: Annotated[
        str, typer.Option(help="Numbers of class centers of which the head alone is timed.")
    ] = "1k,10k,100k",
    workers: Annotated[
        int, typer.Option(help="Number of processes that decode images, of each loader.")
    ] = 2,
    rounds: Annotated[int, typer.Option(help="Maximum number of turns that each loop takes.")] = 3,
    seconds: Annotated[
        float, typer.Option(help="Time limit; each part has one round at least.")
    ] = 150.0,
    precision: Annotated[str, typer.Option(help="Dtype: float32 or bfloat16.")] = "float32",
    device: DeviceOption = "auto",
    memory: Annotated[
        int,
        typer.Option(
            help="MiB of memory for the images, decoded to RGB: a set that fits is decoded before "
            "the loops begin, which then need no loader.",
            min=0,
        ),
    ] = 0,
    data: Annotated[
        Path | None,
        typer.Option(help="Images, one sub-folder per person. Default: the embedded faces."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("training-speed"),
) -> None:
    """Measure images/s of `synface train` and of plain torch, and where a step's time goes."""
    from ..bench.plan import parse_count

    check_folder("--output", output)
    numbers = tuple(parse_count("--classes", each) for each in classes.split(","))
    centers, pixels = parse_count("--identities", identities), parse_size(size)
    assert pixels is not None

    from ..bench import training, training_report
    from ..bench.loops import SpeedConfig
    from ..reporting.plots import check_matplotlib

    check_matplotlib()
    config = SpeedConfig(
        backbone, pixels, batch_size, centers, embedding_size, numbers, workers, rounds, seconds,
        precision, str(chosen_device(device)), memory,
    )  # fmt: skip
    command = "synface bench training"
    for param in context.command.params:
        if is_given(context, str(param.name)) and param.name not in ("data", "output"):
            command += f" {param.opts[0]} {context.params[str(param.name)]}"
    with Bar("measuring") as bar:
        result = training.measure(
            config,
            data,
            lambda done: bar.start(None, done),
            lambda parts: training_report.write_json(parts, output, command),
        )
    say(training_report.summary(result))
    say(f"report: {training_report.write(result, output, command)}")
    if "synface" not in result["seconds"]:
        raise typer.Exit(1)
