"""The report of the demonstration: figures, tables and results in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Faces
from ..evaluation.metrics import Verification
from ..reporting import plots
from ..reporting.page import escape, table, write_page
from .measure import METHODS, Workload


def softmax_table(
    times: Mapping[str, Any], memory: Mapping[str, Any], implementation: str
) -> list[list[str]]:
    """Return rows of: method, milliseconds, ratio to the fused op, MiB above the inputs."""
    rows = [["margin softmax, forward + backward", "time", "against fused", "peak memory"]]
    fused = times.get("fused")
    for method in METHODS:
        label = f"fused (this library, {implementation})" if method == "fused" else method
        seconds, peak = times.get(method), memory.get(method)
        ratio = "not measured"
        if isinstance(seconds, float) and isinstance(fused, float):
            ratio = f"{seconds / fused:.2f} ×"
        rows.append(
            [
                label,
                f"{seconds * 1e3:.0f} ms" if isinstance(seconds, float) else str(seconds),
                ratio,
                f"{peak / 2**20:.0f} MiB" if isinstance(peak, int) else str(peak),
            ]
        )
    return rows


def face_grid(faces: Faces, path: Path, identities: int = 8, images: int = 10) -> None:
    """Draw some images of some identities, one identity a row."""
    shown = range(min(identities, len(faces.identities)))
    rows = [faces.images[faces.labels == label][:images].numpy() for label in shown]
    names = faces.identities[: len(rows)]
    plots.image_grid(rows, names, f"One identity a row: {faces.source}", path)


def write(
    folder: Path,
    *,
    faces: Faces,
    history: Sequence[Mapping[str, float]],
    trained: Verification,
    pixels: Verification,
    workload: Workload,
    times: Mapping[str, Any],
    memory: Mapping[str, Any],
    implementation: str,
    machine: str,
    seconds: float,
) -> Path:
    """Write the report and return its page, ``index.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    face_grid(faces, folder / "faces.png")
    plots.loss_curve(history, folder / "loss.png")
    plots.roc_curves(
        {"trained network": trained, "raw pixels": pixels},
        folder / "roc.png",
        title="Verification of people never trained on",
    )
    result = {
        "data": faces.source,
        "verification": {"trained": trained.to_json(), "raw pixels": pixels.to_json()},
        "margin softmax": {
            "n": workload.n,
            "d": workload.d,
            "c": workload.c,
            "dtype": "float32",
            "seconds": dict(times),
            "peak_bytes": dict(memory),
        },
        "machine": machine,
        "seconds": seconds,
    }
    (folder / "report.json").write_text(json.dumps(result, indent=1))
    head, *rows = softmax_table(times, memory, implementation)
    gradients = (workload.n + workload.c) * workload.d * 4 / 2**20
    text = f"""# From faces to a verified network

Data: {escape(faces.source)}. Measured in this run ({seconds:.0f} s) on {escape(machine)}.

## The faces

![sample faces, one identity a row](faces.png)

## Training

![loss and training accuracy over the epochs](loss.png)

## People never trained on

![ROC of the trained network and raw pixels](roc.png)

### Trained network

```
{trained.summary()}
```

### Raw pixels, centered cosine, the same pairs

```
{pixels.summary()}
```

## What the fused margin softmax saves

N = {workload.n} embeddings of D = {workload.d}, C = {workload.c:,} identities, float32.

{table(head, [[escape(cell) for cell in row] for row in rows])}

Times: medians of the three methods, alternating in one process. Memory: peak resident memory above
the inputs, each in its own process; the gradients alone take {gradients:.0f} MiB.
"""
    write_page(folder / "index.html", text)
    return folder / "index.html"
