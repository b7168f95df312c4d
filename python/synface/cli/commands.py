"""The commands of `synface`; those that compute import torch when they run."""

from __future__ import annotations

from typing import Annotated

import typer

import synface_kernels as sk

from . import (
    align,
    bench,
    conversion,
    demonstration,
    evaluation,
    leak,
    packing,
    planning,
    recipes,
    training,
    use,
)
from .terminal import Group, say

app = typer.Typer(
    cls=Group,
    help="Face recognition on synthetic and real faces, over the fused ops of synface_kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        say(f"synface {sk.__version__}")
        raise typer.Exit


@app.callback()
def synface(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Face recognition on synthetic and real faces, over the fused ops of synface_kernels."""


app.command("train")(training.train_command)
app.command("eval")(evaluation.eval_command)
app.command("embed")(use.embed_command)
app.command("compare")(use.compare_command)
app.command("export")(use.export_command)
app.command("leak")(leak.leak_command)
app.command("align")(align.align_command)
app.command("convert")(conversion.convert_command)
app.command("pack")(packing.pack_command)
app.command("synthesize")(packing.synthesize_command)
app.command("plan")(planning.plan_command)
app.command("study")(recipes.study_command)
app.command("info")(demonstration.info_command)
app.command("demo")(demonstration.demo_command)
app.add_typer(recipes.app, name="recipe")
app.add_typer(bench.app, name="bench")
