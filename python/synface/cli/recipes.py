"""The command line's recipes: synface recipe cfsm, synface, hyperface; and study."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from ..common.check import check_folder
from .options import refuse
from .terminal import Bar, Group, console, interrupts, say

app = typer.Typer(
    cls=Group, help="The papers' recipes, from data to a report.", no_args_is_help=True
)

ConfigOption = Annotated[
    Path | None, typer.Option(help="TOML. Default: small enough for two cores.")
]
RealOption = Annotated[
    Path | None, typer.Option(help="Image folder of real people, not the embedded faces.")
]
ReportOption = Annotated[
    Path | None, typer.Option(help="Folder of the report. Default: report, in the run's.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run.")]
CellOption = Annotated[
    str | None,
    typer.Option(
        help="Run this one training run alone, without the report: others may run beside it; "
        "--resume puts them together."
    ),
]
FacesOption = Annotated[bool, typer.Option(help="Show some generated faces in the report.")]


@app.callback()
def recipe() -> None:
    """The papers' recipes, from data to a report."""


@app.command("cfsm")
def cfsm_command(
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/cfsm"),
    config: ConfigOption = None,
    faces: Annotated[
        Path | None, typer.Option(help="Image folder, in place of the embedded faces.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(help="Image folder of unlabeled faces of the target domain (degraded too)."),
    ] = None,
    report: ReportOption = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.", min=0)] = None,
    resume: ResumeOption = False,
) -> None:
    """Learn style subspaces of degraded faces, and train a recogniser on guided ones (CFSM)."""
    from ..recipes.cfsm import recipe as cfsm
    from ..recipes.cfsm import report as cfsm_report

    settings = cfsm.load_config(config)
    data = settings.data
    data = replace(data, faces=str(faces) if faces else data.faces)
    data = replace(data, target=str(target) if target else data.target)
    settings = replace(settings, data=data)
    if seed is not None:
        recogniser = replace(settings.recogniser, seed=seed)
        settings = replace(settings, seed=seed, recogniser=recogniser)
    command = "synface recipe cfsm"
    command += _given(config=config, faces=faces, target=target, seed=seed)

    _check_outputs(output, report)
    began = time.perf_counter()
    with interrupts(f"{command} --output {output} --resume goes on"):
        results = cfsm.run(settings, output, resume=resume, progress=Bar)
    figures = cfsm_report.measured(results)
    for domain, found in figures["style"].items():
        cosines = found["cosine along the axes"]
        console.print(
            f"{domain}: L_ort {found['orthogonality l1, last step']:.1e}; cosine to the original "
            f"{cosines[0]:.3f} at strength 0, {cosines[-1]:.3f} at "
            f"{figures['strengths'][-1]:g}",
            highlight=False,
        )
    loss = figures["loss"]
    for name in ("random", "guided"):
        more = loss[f"{name} above style"]
        console.print(
            f"{name} images raise the loss by {more['mean']:.3f} ± {more['std']:.3f} "
            f"({loss['batches']} batches)",
            highlight=False,
        )
    page = cfsm_report.write(
        results,
        report or output / "report",
        command,
        None if resume else time.perf_counter() - began,
    )
    say(f"report: {page}")


def _run(
    context: typer.Context,
    name: str,
    called: str,
    output: Path,
    config: Path | None,
    real: Path | None,
    report: Path | None,
    cell: str | None,
    resume: bool,
    **shown: bool,
) -> None:
    """A recipe of several training runs, and its report. called: the command's words."""
    if cell is not None:
        refuse(context, "with --cell, which writes no report", "report", "faces")
    recipe = import_module(f"synface.recipes.{name}")
    settings = recipe.load_config(config)
    data = replace(settings.data, real=str(real) if real else settings.data.real)
    settings = replace(settings, data=data)
    command = f"synface {called}{_given(config=config, real=real)}"
    _check_outputs(output, report)
    with interrupts(f"{command} --output {output} --resume goes on"):
        results = recipe.run(settings, output, resume=resume, only=cell, progress=Bar)
    if cell is None:
        page = recipe.write(results, report or output / "report", command, **shown)
        say(f"report: {page}")


def _register(name: str, summary: str) -> None:
    """The command of a recipe of several training runs whose report may show faces."""

    @app.command(name, help=summary)
    def command(
        context: typer.Context,
        output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs") / name,
        config: ConfigOption = None,
        real: RealOption = None,
        report: ReportOption = None,
        faces: FacesOption = True,
        cell: CellOption = None,
        resume: ResumeOption = False,
    ) -> None:
        _run(
            context, name, f"recipe {name}", output, config, real, report, cell, resume, faces=faces
        )


_register(
    "synface", "Train on generated faces, mixed by identity and with a few real people (SynFace)."
)
_register(
    "hyperface",
    "Pack identities, draw their faces, train and verify, beside random ones (HyperFace).",
)


def study_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="The study's folder.")] = Path("runs/study"),
    config: ConfigOption = None,
    real: RealOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: report, in the study's.")
    ] = None,
    cell: CellOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study.")] = False,
) -> None:
    """Accuracy over identities × images of each, and by attribute, with and without mixup."""
    _run(context, "study", "study", output, config, real, report, cell, resume)


def _check_outputs(output: Path, report: Path | None) -> None:
    check_folder("--output", output)
    if report is not None:
        check_folder("--report", report)


def _given(**options: object) -> str:
    return "".join(f" --{name} {value}" for name, value in options.items() if value is not None)
