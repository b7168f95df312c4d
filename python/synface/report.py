"""The demonstration's report folder: pictures to look at, tables to read."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Faces
from .evaluate import Verification
from .extras import extra
from .measure import METHODS, Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ACCENT, QUIET = "#22313f", "#c0392b", "#95a5a6"


def _figure(width: float, height: float, *grid: int, **options: Any) -> Any:
    with extra("train", "drawing figures"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

    return plt.subplots(*grid, figsize=(width, height), layout="constrained", **options)


def _save(figure: Figure, path: Path) -> None:
    with extra("train", "drawing figures"):
        import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_page(path: Path, text: str) -> None:
    """Write a page in UTF-8, whatever the locale; names of files keep their bytes."""
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def sample_faces(faces: Faces, path: Path, identities: int = 8, images: int = 10) -> None:
    """A grid: one identity a row, its images side by side."""
    identities = min(identities, len(faces.identities))
    images = min(images, int(faces.labels.bincount()[:identities].max()))
    rows = []
    for label in range(identities):
        own = faces.images[faces.labels == label][:images]
        blank = torch.full(
            (images - len(own), *own.shape[1:]), 255, dtype=torch.uint8, device="cpu"
        )
        rows.append(torch.cat([own, blank]).permute(1, 0, 2, 3).flatten(1, 2))
    grid = torch.cat(rows)
    figure, axes = _figure(images * 0.9, identities * 0.95 + 0.4)
    axes.imshow(grid.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    height = faces.images.shape[1]
    axes.set_yticks([height * (i + 0.5) for i in range(identities)], faces.identities[:identities])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(f"One identity a row: {faces.source}", color=INK, fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _save(figure, path)


def loss_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and training accuracy over the epochs."""
    figure, axes = _figure(6.4, 3.8)
    epochs = [row["epoch"] for row in history]
    axes.plot(epochs, [row["loss"] for row in history], color=ACCENT, linewidth=1.2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (margin cross entropy)", color=ACCENT)
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(epochs, [row["accuracy"] for row in history], color=INK, linewidth=0.8, alpha=0.7)
    other.set_ylabel("share of training images nearest to their own centre", color=INK, fontsize=8)
    other.set_ylim(0, 1.02)
    axes.set_title("Training", color=INK)
    axes.grid(alpha=0.25)
    _save(figure, path)


def roc(curves: Mapping[str, Verification], path: Path) -> None:
    """True against false accepts, the false ones on a logarithmic axis."""
    figure, axes = _figure(5.6, 4.4)
    for (name, result), color in zip(curves.items(), (ACCENT, QUIET, INK), strict=False):
        lowest = 1 / result.impostor
        axes.step(
            result.fpr.clip(lowest / 2),
            result.tpr,
            where="post",
            color=color,
            label=f"{name}: area {result.auc:.4f}",
        )
    axes.set_xscale("log")
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("true accept rate")
    axes.set_xlim(right=1)
    axes.set_ylim(0, 1.02)
    axes.set_title("Verification of people never trained on", color=INK)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.25, which="both")
    _save(figure, path)


def softmax_table(
    times: Mapping[str, Any], memory: Mapping[str, Any], implementation: str
) -> list[list[str]]:
    """Rows of: method, milliseconds, times the fused op's, MiB above the inputs."""
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
    """Writes the report and returns its page, ``index.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    sample_faces(faces, folder / "faces.png")
    loss_curve(history, folder / "loss.png")
    roc({"trained network": trained, "raw pixels": pixels}, folder / "roc.png")
    table = softmax_table(times, memory, implementation)
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
    write_page(folder / "index.html", _page(result, trained, pixels, table, workload))
    return folder / "index.html"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22313f; max-width: 52rem; margin: 2rem auto;
       padding: 0 1rem } img { max-width: 100% } pre { background: #f4f6f7; padding: 1rem }
table { border-collapse: collapse } td, th { padding: .3rem 1rem .3rem 0; text-align: left;
       border-bottom: 1px solid #dfe4e6 } small { color: #7f8c8d }
"""


def _page(
    result: Mapping[str, Any],
    trained: Verification,
    pixels: Verification,
    table: Sequence[Sequence[str]],
    workload: Workload,
) -> str:
    def tr(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head, *rows = table
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>synface: demonstration</title><style>{_STYLE}</style>
<h1>From faces to a verified network</h1>
<p>Data: {html.escape(result["data"])}. Measured in this run ({result["seconds"]:.0f} s) on
{html.escape(result["machine"])}.</p>
<h2>The faces</h2><img src="faces.png" alt="sample faces, one identity a row">
<h2>Training</h2><img src="loss.png" alt="loss and training accuracy over the epochs">
<h2>People never trained on</h2><img src="roc.png" alt="ROC of the trained network and raw pixels">
<h3>Trained network</h3><pre>{html.escape(trained.summary())}</pre>
<h3>Raw pixels, centred cosine, the same pairs</h3><pre>{html.escape(pixels.summary())}</pre>
<h2>What the fused margin softmax saves</h2>
<p>N = {workload.n} embeddings of D = {workload.d}, C = {workload.c:,} identities, float32.</p>
<table>{tr(head, "th")}{"".join(tr(row, "td") for row in rows)}</table>
<p><small>Times: medians, the three in turn in one process. Memory: peak resident memory above the
inputs, each in a process of its own; the gradients alone take
{(workload.n + workload.c) * workload.d * 4 / 2**20:.0f} MiB.</small></p>
</html>
"""
