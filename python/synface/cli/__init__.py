"""The command line: synface train, eval, pack, synthesize, convert, plan, study, recipe …"""

from __future__ import annotations

import typer
from rich.markup import escape

from ..interrupts import Terminated, raise_on_sigterm
from . import bench, conversion, demonstration, packing, planning, recipes, training
from .terminal import console

app = typer.Typer(
    help="Face recognition on synthetic and real faces, over the fused ops of synface_kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(training.train_command)
app.command("eval")(training.eval_command)
app.command("convert")(conversion.convert_command)
app.command("pack")(packing.pack_command)
app.command("synthesize")(packing.synthesize_command)
app.command("plan")(planning.plan_command)
app.command("study")(recipes.study_command)
app.command("info")(demonstration.info_command)
app.command("demo")(demonstration.demo_command)
app.add_typer(recipes.app, name="recipe")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Runs the command line; an error that the user can act on is one line, without a traceback."""
    raise_on_sigterm()
    try:
        app()
    except Terminated:
        console.print("terminated")
        raise
    except (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError) as error:
        console.quiet = False
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
