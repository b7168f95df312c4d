"""Packings in files: one per objective, a plot, and checkpoints during the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ... import checkpoint
from ...common.check import check_folder
from ...common.extras import extra
from ...common.files import CheckpointError, check_output
from ...reporting.plots import check_matplotlib
from .packer import Packed, Packer, PackingProgress
from .plot import plot


def outputs(output: Path, objectives: Sequence[str]) -> dict[str, Path]:
    """Return each objective's file: ``output`` for the first, named after them for the others."""
    first, *others = objectives
    return {first: output} | {o: output.with_name(f"{output.stem}-{o}.safetensors") for o in others}


def pack(
    packers: Sequence[Packer],
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], AbstractContextManager[PackingProgress]],
) -> list[Packed]:
    """Run each packer in turn; write ``output`` and, beside it, the others' points and a plot.

    Checkpoints are in NAME-OBJECTIVE.checkpoints beside the output until all is written.

    Args:
        packers: of one (N, d), each with another objective.
        output: a .safetensors file.
        resume: resume from the checkpoints.
        overwrite: replace files of these names and, unless resume is set, discard checkpoints.
        progress: makes the progress bar of an objective.

    Raises:
        ValueError: for an output of another suffix, or an objective twice.
        FileExistsError: if a file or checkpoints would be lost.
        CheckpointError: if there is nothing to resume, or it is of another run.
        OSError: if a file cannot be written: before the first step if the folder is not writable,
            otherwise (a full disk, say) checkpoints remain.
        KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, with a checkpoint written.
    """
    names = [packer.config.objective for packer in packers]
    if len(set(names)) < len(names):
        raise ValueError(f"each objective must be given once, got {names}")
    if output.suffix != ".safetensors":
        raise ValueError(f"output must be a .safetensors file, got {output}")
    files = outputs(output, names)
    picture = output.with_suffix(".png")
    folders = {o: output.with_name(f"{output.stem}-{o}.checkpoints") for o in names}
    if resume and not any(checkpoint.checkpoints(folder) for folder in folders.values()):
        raise CheckpointError(f"nothing to resume: no checkpoints in {folders[names[0]]}")
    for file in (*files.values(), picture):
        check_output(file, overwrite)
    check_folder(f"the folder of {output.name}", output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_matplotlib()  # before the packing, not after it
    with extra("train", "a packing's file"):
        import safetensors.torch  # noqa: F401

    if not resume:
        for folder in folders.values():
            if overwrite:
                shutil.rmtree(folder, ignore_errors=True)
            elif checkpoint.checkpoints(folder):
                raise FileExistsError(
                    f"{folder} holds an interrupted run: --resume continues it, "
                    "--overwrite discards it"
                )
    packings = []
    for name, packer in zip(names, packers, strict=True):
        begun = bool(checkpoint.checkpoints(folders[name]))
        with progress(name) as bar:
            packings.append(packer.run(folders[name], resume=begun, progress=bar))
    for packing in packings:
        packing.save(files[packing.config.objective], overwrite=True)
    plot(packings, picture)
    for folder in folders.values():
        shutil.rmtree(folder)
    return packings
