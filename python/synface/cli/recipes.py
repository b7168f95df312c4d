"""The commands `synface recipe cfsm`, `synface`, `gap` and `hyperface`, and `synface study`."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from ..common.check import check_folder
from .options import refuse
from .terminal import Bar, Group, SweepBar, interrupts, say

app = typer.Typer(
    cls=Group, help="The papers' recipes, from data to a report.", no_args_is_help=True
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(help="TOML file of the configuration. Default: one small enough for two cores."),
]
RealOption = Annotated[
    Path | None,
    typer.Option(help="Image folder of real people. Default: the embedded faces."),
]
ReportOption = Annotated[
    Path | None, typer.Option(help="Folder of the report. Default: report, in the run's folder.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume the run in --output.")]
CellOption = Annotated[
    str | None,
    typer.Option(
        help="Run only this training run, without the report. Others may run in parallel; "
        "--resume then writes the report."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that train, with an equal share of the cores each; 1: this process. "
        "Default: one per core with 1 GiB of memory.",
    ),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Take a size of about two minutes, for a first look.")
]
RedrawOption = Annotated[
    bool,
    typer.Option(
        "--redraw",
        help="Draw the report's plots again from the numbers in its JSON file; train nothing.",
    ),
]
FacesOption = Annotated[bool, typer.Option(help="Show some generated faces in the report.")]


@app.command("cfsm")
def cfsm_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/cfsm"),
    config: ConfigOption = None,
    faces: Annotated[
        Path | None,
        typer.Option(help="Image folder to train on. Default: the configuration's."),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(help="Image folder of unlabeled faces of the target domain (degraded too)."),
    ] = None,
    report: ReportOption = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", min=0)] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(
            help="Stage 1: extended, or paper, which is without this library's additions."
        ),
    ] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Learn styles also without each addition.")
    ] = False,
    resume: ResumeOption = False,
    workers: WorkersOption = None,
    quick: QuickOption = False,
) -> None:
    """Learn style subspaces of degraded faces, and train a recognizer on guided ones (CFSM)."""
    from ..recipes import cfsm

    if quick:
        refuse(context, "with --quick, which has a configuration of its own", "config")
    settings = cfsm.load_config(config, quick=quick)
    data = replace(settings.data, **_paths(faces=faces, target=target))
    settings = replace(settings, data=data)
    if seed is not None:
        recognizer = replace(settings.recognizer, seed=seed)
        settings = replace(settings, seed=seed, recognizer=recognizer)
    if fidelity == "extended" != settings.fidelity:
        raise ValueError(f"{config} has fidelity = {settings.fidelity!r}: change it there")
    if fidelity is not None:
        settings = replace(settings, fidelity=fidelity)
    chosen = {"seed": seed, "fidelity": fidelity, "workers": workers}
    command = _command("recipe cfsm", config=config, faces=faces, target=target, **chosen)
    command += " --ablations" * ablations + " --quick" * quick
    if not (quick or config or resume or ablations):
        say("the default size takes about an hour on two cores (--quick: about two minutes)")
    _check_outputs(output, report)
    began = time.perf_counter()
    with interrupts(f"continue with {command} --output {output} --resume"):
        results = cfsm.run(
            settings, output, resume=resume, progress=Bar, workers=workers, ablations=ablations
        )
    numbers = cfsm.measured(results)
    for domain, found in numbers["style"].items():
        cosines = found["cosine along the axes"]
        say(
            f"{domain}: L_ort {found['orthogonality l1, last step']:.1e}; cosine to the original "
            f"{cosines[0]:.3f} at strength 0, {cosines[-1]:.3f} at "
            f"{numbers['strengths'][-1]:g}"
        )
    loss = numbers["loss"]
    for name in ("random", "guided"):
        more = loss[f"{name} above style"]
        say(
            f"{name} images raise the loss by {more['mean']:.3f} (standard deviation over "
            f"{loss['batches']} batches: {more['std']:.3f})"
        )
    for line in cfsm.conclusions(numbers).splitlines():
        say(line)
    seconds = None if resume else time.perf_counter() - began
    page = cfsm.write(results, report or output / "report", command, seconds)
    say(f"report: {page}")


def _run(
    context: typer.Context,
    module: str,
    called: str,
    output: Path,
    config: Path | None,
    real: Path | None,
    report: Path | None,
    cell: str | None,
    resume: bool,
    workers: int | None,
    quick: bool,
    redraw: bool,
    **shown: bool,
) -> None:
    """Run a recipe of several training runs, and write its report.

    Args:
        module: the recipe's module. called: the command's name.
    """
    if cell is not None:
        refuse(context, "with --cell, which writes no report", "report", "faces")
        refuse(context, "with --cell, which trains in this process", "workers")
    if quick:
        refuse(context, "with --quick, which has a configuration of its own", "config")
    recipe = import_module(f"synface.recipes.{module}")
    if redraw:
        _redraw(context, recipe, called.split()[-1], report or output / "report")
        return
    settings = recipe.load_config(config, quick=quick)
    settings = replace(settings, data=replace(settings.data, **_paths(real=real)))
    command = _command(called, config=config, real=real, workers=workers)
    command += " --quick" if quick else ""
    hint = "" if quick or config or cell else " (--quick: about two minutes)"
    progress = partial(SweepBar, hint=hint)
    _check_outputs(output, report)
    with interrupts(f"continue with {command} --output {output} --resume"):
        results = recipe.run(
            settings, output, resume=resume, only=cell, progress=progress, workers=workers
        )
    if cell is None:
        page = recipe.write(results, report or output / "report", command, **shown)
        say(f"report: {page}")


def _redraw(context: typer.Context, recipe: ModuleType, name: str, folder: Path) -> None:
    """Draw those plots of a report again whose numbers its JSON file has."""
    from ..recipes.report import redraw

    training = ("config", "real", "cell", "resume", "workers", "quick", "faces")
    refuse(context, "with --redraw, which trains nothing", *training)
    for picture in redraw(folder, name, recipe.pictures):
        say(f"drawn: {picture}")


def _register(name: str, summary: str) -> None:
    """Register the command of a recipe of several training runs whose report may show faces."""

    @app.command(name, help=summary)
    def command(
        context: typer.Context,
        output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs") / name,
        config: ConfigOption = None,
        real: RealOption = None,
        report: ReportOption = None,
        faces: FacesOption = True,
        cell: CellOption = None,
        resume: ResumeOption = False,
        workers: WorkersOption = None,
        quick: QuickOption = False,
        redraw: RedrawOption = False,
    ) -> None:
        _run(
            context,
            name,
            f"recipe {name}",
            output,
            config,
            real,
            report,
            cell,
            resume,
            workers,
            quick,
            redraw,
            faces=faces,
        )


_register(
    "synface", "Train on generated faces, mixed by identity and with a few real people (SynFace)."
)
_register("gap", "Compare generated faces with real ones, by embeddings and networks (SynFace).")
_register(
    "hyperface",
    "Pack identities, generate faces, train and verify; compare with random ones (HyperFace).",
)


def study_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/study"),
    config: ConfigOption = None,
    real: RealOption = None,
    report: ReportOption = None,
    cell: CellOption = None,
    resume: ResumeOption = False,
    workers: WorkersOption = None,
    quick: QuickOption = False,
    redraw: RedrawOption = False,
) -> None:
    """Measure accuracy by identities, images per identity and attribute, with and without mixup.

    Networks are trained on generated faces, and verified on real people.
    """
    _run(
        context,
        "synface.study",
        "study",
        output,
        config,
        real,
        report,
        cell,
        resume,
        workers,
        quick,
        redraw,
    )


def _check_outputs(output: Path, report: Path | None) -> None:
    check_folder("--output", output)
    if report is not None:
        check_folder("--report", report)


def _command(called: str, **options: object) -> str:
    given = (f" --{name} {value}" for name, value in options.items() if value is not None)
    return f"synface {called}{''.join(given)}"


def _paths(**options: Path | None) -> dict[str, str]:
    return {name: str(path) for name, path in options.items() if path}
