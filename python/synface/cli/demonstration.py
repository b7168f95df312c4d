"""The commands `synface demo` and `synface info`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.check import check_folder
from .options import SeedOption
from .terminal import Bar, print_table, say


def info_command() -> None:
    """Show versions, devices, and the implementation that each op uses."""
    from synface_kernels import _env

    say(_env.report())


def demo_command(
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("synface-report"),
    seed: SeedOption = 0,
    epochs: Annotated[int, typer.Option(help="Number of training epochs.")] = 12,
    identities: Annotated[
        int, typer.Option(help="Number of embedded identities.", min=4, max=100)
    ] = 100,
    images: Annotated[int, typer.Option(help="Images per identity.", min=2)] = 20,
    classes: Annotated[
        int, typer.Option(help="Number of classes of the measured softmax.", min=2)
    ] = 100_000,
) -> None:
    """Train on real faces, verify on others, measure the fused softmax; write a report."""
    import tempfile

    import torch

    import synface_kernels as sk
    from synface_kernels import _env

    from ..bench import demo, measure
    from ..data import embedded_faces
    from ..training.config import TrainConfig
    from ..training.loop import train
    from .verification import print_verification, verify_network, verify_pixels

    check_folder("--output", output)
    began = time.perf_counter()
    faces = embedded_faces(images_per_identity=images, identities=identities, seed=seed)
    held_out = max(2, identities // 5)
    learn, held = faces.split(held_out)
    say(
        f"1. {faces.source}\n   training on {len(learn.identities)} people, verifying on "
        f"{held_out} others"
    )
    config = TrainConfig(epochs=epochs, seed=seed, checkpoint_every=max(1, epochs))
    with tempfile.TemporaryDirectory() as folder, Bar("   training") as bar:
        result = train(config, learn, Path(folder) / "run", progress=bar)
    trained, pixels = verify_network(result.backbone, held), verify_pixels(held)
    print_verification(trained, pixels, held)

    work = measure.Workload(c=classes)
    say(f"2. the margin softmax over {work.c:,} identities: N={work.n}, D={work.d}, float32")
    with Bar("   measuring") as bar:
        bar.start(len(measure.METHODS) * 5, 0)
        memory: dict[str, Any] = {}
        for method in measure.METHODS:
            memory[method] = measure.peak_memory(method, work)
            bar.advance(f"memory of {method}")
        times = measure.time_all(work, 3, lambda method: bar.advance(f"time of {method}"))
    implementation = f"impl={sk.explain('margin_cross_entropy').impl}"
    header, *rows = demo.softmax_table(times, memory, implementation)
    print_table(header, rows)

    seconds = time.perf_counter() - began
    page = demo.write(
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
    say(f"3. report: {page} ({seconds:.0f} s in all)")
