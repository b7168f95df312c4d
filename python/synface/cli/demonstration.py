"""The commands `synface demo` and `synface info`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..common.check import check_folder
from .options import SeedOption
from .terminal import Bar, PackingBar, print_table, say

SIZE = 32  # pixels; the embedded faces have 25
PACKED_DIM, PACKING_STEPS = 128, 200
ROUNDS = 3  # of the softmax's timing


def info_command() -> None:
    """Show versions, devices, and the implementation that each op uses."""
    from synface_kernels import _env

    say(_env.report())


def demo_command(
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("synface-report"),
    seed: SeedOption = 0,
    epochs: Annotated[int, typer.Option(help="Number of training epochs.")] = 10,
    identities: Annotated[
        int, typer.Option(help="Number of embedded identities.", min=4, max=100)
    ] = 100,
    images: Annotated[int, typer.Option(help="Images per identity.", min=2)] = 20,
    classes: Annotated[
        int, typer.Option(help="Number of classes of the measured softmax.", min=2)
    ] = 100_000,
    points: Annotated[int, typer.Option(help="Number of packed points.", min=2)] = 1000,
) -> None:
    """Mix faces, pack points, measure the softmax, train on real faces, verify; write a report."""
    import tempfile
    from datetime import date

    import torch

    import synface_kernels as sk
    from synface_kernels import _env

    from ..bench import demo, measure
    from ..data import embedded_faces
    from ..synthesis import packing
    from ..training.config import TrainConfig
    from ..training.loop import train
    from .verification import Verifier

    check_folder("--output", output)
    began = time.perf_counter()
    faces = embedded_faces(images_per_identity=images, size=SIZE, identities=identities, seed=seed)
    held_out = max(2, identities // 5)
    learn, held = faces.split(held_out)

    photographs = embedded_faces(1, demo.MIXED_SIZE, identities=identities)
    mixed = demo.mix_faces(photographs.images[-held_out], seed)
    say(
        f"1. identity and domain mixup: two generated identities and a real face, mixed in "
        f"{len(demo.SHARES)}×{len(demo.SHARES)} shares"
    )

    bound = packing.bounds.best(points, PACKED_DIM)
    with PackingBar("orbit", bound.cosine) as bar:
        packed = demo.pack_points(points, PACKED_DIM, PACKING_STEPS, seed, bar)
    say(
        f"2. packing: {points:,} points in {PACKED_DIM} dimensions, worst cosine "
        f"{packed.packed.worst:.4f} (random {packed.random_nearest.max():.4f}, {bound.name} bound "
        f"{bound.cosine:.4f}), {packed.seconds:.1f} s"
    )

    work = measure.Workload(c=classes)
    say(f"3. the margin softmax over {work.c:,} identities: N={work.n}, D={work.d}, float32")
    with Bar("   measuring") as bar:
        bar.start(len(measure.METHODS) * (ROUNDS + 2), 0)
        times, memory = measure.measure_all(work, ROUNDS, bar.advance)
    implementation = f"impl={sk.explain('margin_cross_entropy').impl}"
    softmax = demo.Softmax(work, times, memory, implementation)
    header, *rows = demo.softmax_table(softmax)
    print_table(header, rows)

    say(
        f"4. {faces.source}\n   training on {len(learn.identities)} people, verifying on "
        f"{held_out} others"
    )
    config = TrainConfig(epochs=epochs, seed=seed, checkpoint_every=max(1, epochs))
    with tempfile.TemporaryDirectory() as folder, Bar("   training") as bar:
        started = time.perf_counter()
        result = train(config, learn, Path(folder) / "run", progress=bar)
        rate = bar.images / (time.perf_counter() - started)
    verifier = Verifier(held)
    trained = verifier(result.backbone)
    assert verifier.embeddings is not None
    verifier.print(trained)

    seconds = time.perf_counter() - began
    page = demo.write(
        output,
        faces=faces,
        mixed=mixed,
        points=packed,
        softmax=softmax,
        recognition=demo.Recognition(
            result.history,
            learn,
            held,
            verifier.embeddings,
            trained.verification,
            verifier.pixels.verification,
            rate,
        ),
        about={
            "date": date.today().isoformat(),
            "version": sk.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": _env.processor(),
        },
        seconds=seconds,
    )
    say(f"5. report: {page} ({time.perf_counter() - began:.0f} s in all)")
