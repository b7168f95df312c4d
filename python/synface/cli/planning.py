"""The command `synface plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..bench import plan
from .options import from_options, options_of
from .terminal import console, say


@options_of(plan.Settings)
def plan_command(
    context: typer.Context,
    identities: Annotated[str, typer.Option(help="Number of identities: 250000, 10M, 1.5B.")],
    gpu_memory: Annotated[
        str | None, typer.Option(help="Memory per GPU: 80GB, 24GiB. Default: the device's.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="Rates measured on that device: the result file of make gpu-evidence."),
    ] = None,
    **given: Any,
) -> None:
    """Estimate memory per GPU, bytes exchanged and time per step, and what makes a run fit."""
    device, backbone = given["device"], given["backbone"]
    if device not in plan.DEVICES:
        raise ValueError(f"--device must be one of {', '.join(plan.DEVICES)}, got {device!r}")
    given["identities"] = plan.parse_count("--identities", identities)
    given["gpu_memory"] = (
        plan.DEVICES[device].memory
        if gpu_memory is None
        else plan.parse_bytes("--gpu-memory", gpu_memory)
    )
    given["backbone"] = None if backbone == "none" else backbone
    settings = from_options(plan.Settings, given)
    _print_plan(plan.plan(settings, None if measured is None else plan.read_measured(measured)))


def _print_plan(found: plan.Plan) -> None:
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
