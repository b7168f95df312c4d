"""The command `synface plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .terminal import console, say

if TYPE_CHECKING:
    from ..bench.plan import Plan


def plan_command(
    identities: Annotated[str, typer.Option(help="Number of identities: 250000, 10M, 1.5B.")],
    dim: Annotated[int, typer.Option(help="Dimension of the embeddings.", min=1)] = 512,
    gpus: Annotated[
        int, typer.Option(help="Number of GPUs; the classes are split among them.", min=1)
    ] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory per GPU: 80GB, 24GiB. Default: the device's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per step, over all GPUs.")] = 1024,
    labels: Annotated[int, typer.Option(help="Labels per image; mixing gives up to 3.", min=1)] = 1,
    sample_rate: Annotated[
        float, typer.Option(help="Share of the classes sampled in a step.", max=1.0)
    ] = 1.0,
    fused_update: Annotated[
        bool, typer.Option("--fused-update", help="Step the centers in the backward pass.")
    ] = False,
    centers: Annotated[
        str, typer.Option(help="Dtype of the class centers: float32 or bfloat16.")
    ] = "float32",
    optimizer: Annotated[
        str, typer.Option(help="Optimizer of the class centers: sgd, adamw or none.")
    ] = "sgd",
    backbone: Annotated[
        str, typer.Option(help="Backbone: r18, r34, r50 or r100 at 112x112, or none.")
    ] = "r50",
    precision: Annotated[
        str, typer.Option(help="Precision of the backbone: bfloat16 or float32.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="GPU: a100, h100, h200 or rtx4090.")] = "h100",
    measured: Annotated[
        Path | None,
        typer.Option(help="Rates measured on that device: the result file of make gpu-evidence."),
    ] = None,
) -> None:
    """Estimate memory per GPU, bytes exchanged and time per step, and how to make a run fit."""
    from ..bench import plan

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
    say(
        f"{s.identities:,} identities × {s.dim}, {s.centers}, on {s.gpus} × {s.device}: "
        f"{s.classes:,} classes per GPU, {s.sampled:,} of them in a step; batch {s.batch:,}, "
        f"{s.images:,} images per GPU"
    )
    memory = [(name, f"{size / 2**30:.2f}") for name, size in found.memory.items()]
    show("memory per GPU", "GiB", [*memory, ("total", f"{found.total / 2**30:.2f}")])
    if s.gpus > 1:
        sent = [(name, f"{size / 1e6:.2f}") for name, size in found.exchange.items()]
        total = sum(found.exchange.values())
        show("sent by a GPU per step", "MB", [*sent, ("total", f"{total / 1e6:.2f}")])
    parts = [
        (name, f"{1e3 * part.seconds:.2f}", part.bound + (", measured" if part.measured else ""))
        for name, part in found.time.items()
    ]
    rate = s.batch / found.seconds
    total_time = ("total", f"{1e3 * found.seconds:.2f}", f"{rate:,.0f} images/s")
    show("time per step, at least", "ms", [*parts, total_time])
    say(f"rates: {found.rates}")
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
