"""A fuzzer of the readers, run in a process of its own.

Prints a line of JSON: the numbers of files refused and read, the growth of the peak memory, and
the errors. Any exception but the readers' own ends it.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import resource
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from synface.data.formats import decode
from synface.data.formats.conversion import convert
from synface.data.formats.decode import DataError
from synface.data.formats.images import open_images
from synface.evaluation.sets import open_set

IMAGES, MEMORY = 9, 1 << 30
FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen"} | {
    "pickle.find_class",
    "socket.connect",
    "ctypes.dlopen",
}
NUMBERS = [0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
watching = False


def watch(event: str, arguments: tuple) -> None:
    if watching and event in FORBIDDEN:
        print(f"executed: {event} {arguments}", file=sys.stderr, flush=True)
        sys.exit(3)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, ("PNG", "JPEG", "BMP", "WEBP")[seed % 4])
    return buffer.getvalue()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Return a mutated copy: a few changed bytes, numbers, cuts or repeats."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4])):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(7)
        if kind == 0:
            for _ in range(draw.randrange(1, 9)):
                if data:
                    data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = draw.randbytes(draw.randrange(1, 40))
        elif kind == 4:
            number = draw.choice(NUMBERS).to_bytes(8, draw.choice(["little", "big"]))
            size = draw.choice([1, 2, 4, 8])
            data[at : at + size] = number[:size]
        elif kind == 5:
            data[at:at] = data[at : at + draw.randrange(1, 200)]
        elif data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
    return bytes(data)


def hostile(marker: Path, draw: random.Random) -> bytes:
    """Return opcodes that make `pickle` create a file."""
    command = f"touch {marker}".encode()
    return draw.choice(
        [
            b"cos\nsystem\n(S'" + command + b"'\ntR",
            b"\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R",
            b"(S'" + command + b"'\nios\nsystem\n",
            b"c__builtin__\neval\n(S'1'\ntR",
            b"cnumpy\nload\n(S'x'\ntR",
        ]
    )


def build(kind: str, folder: Path) -> Path:
    """Write a sound set of a few images."""
    source = folder / "source"
    for i in range(IMAGES):
        (source / f"p{i % 3}").mkdir(parents=True, exist_ok=True)
        (source / f"p{i % 3}" / f"{i}.png").write_bytes(picture(i))
    path = folder / "set"
    if kind in ("folder", "recordio", "webdataset", "parquet", "arrow"):
        convert(source, path, kind)
    elif kind == "recordio-scanned":
        convert(source, path, "recordio")
        (path / "train.idx").unlink()
    elif kind == "parquet-paths":
        convert(source, path, "folder")
        files = sorted(path.glob("*/*"))
        write_paths(path, [str(file.relative_to(path)) for file in files])
    elif kind == "webdataset-gz":
        convert(source, path, "webdataset")
        for shard in list(path.glob("*.tar")):
            shard.with_suffix(".tar.gz").write_bytes(gzip.compress(shard.read_bytes(), 1, mtime=0))
            shard.unlink()
    else:
        path.mkdir()
        write_set(kind, path, source)
    return path


def write_paths(path: Path, names: list[str]) -> None:
    """Write a table of paths in place of images, and of labels by category."""
    import pyarrow as pa
    import pyarrow.parquet

    people = pa.array([name.split("/")[0] for name in names])
    columns = {"path": names, "label": people.dictionary_encode()}
    pa.parquet.write_table(pa.table(columns), path / "train.parquet")


def write_set(kind: str, path: Path, source: Path) -> None:
    if kind == "bin":
        images, same = [picture(i) for i in range(8)], [True, False, True, False]
        arrays = [np.frombuffer(image, np.uint8) for image in images]
        for i, protocol in enumerate((2, 3, 4)):
            value = (images, same)
            (path / f"bytes{i}.bin").write_bytes(pickle.dumps(value, protocol))
            value = (arrays, np.array(same))
            (path / f"arrays{i}.bin").write_bytes(pickle.dumps(value, protocol))
    elif kind == "path-pairs":
        lines = ["p0/0.png p0/3.png 1", "p0/0.png,p1/1.png,0", "p1/1.png\tp1/4.png\t1"]
        (path / "pairs.txt").write_text("\n".join(lines))
        copy(source, path)
    elif kind == "pairs":
        lines = ["2\t1", "p0 0 3", "p0 0 p1 1", "p1 1 4", "p1 4 p2 2"]
        (path / "pairs.txt").write_text("\n".join(lines))
        copy(source, path)
    else:
        (path / "t_tid_mid.txt").write_text("".join(f"{i}.png {i // 2} {i}\n" for i in range(8)))
        (path / "t_template_pair_label.txt").write_text("0 1 1\n1 2 0\n2 3 1\n")
        (path / "t_gallery.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n0,5\n1,6\n")
        (path / "t_probe.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n2,5\n3,6\n")
        for i in range(8):
            (path / f"{i}.png").write_bytes(picture(i))


def copy(source: Path, path: Path) -> None:
    for file in source.glob("*/*"):
        (path / file.parent.name).mkdir(exist_ok=True)
        (path / file.parent.name / file.name).write_bytes(file.read_bytes())


def read(kind: str, path: Path, file: Path) -> None:
    """List a set and read all of it; decode it where the images themselves are mutated."""
    if kind in ("bin", "pairs", "path-pairs", "templates"):
        found = open_set({"bin": file, "templates": path}.get(kind, path / "pairs.txt"))
        for i in range(len(found.store)):
            found.store.read(i)
        return
    images = open_images(path)
    for _ in images.samples():
        pass
    if kind == "folder":
        pixels = np.empty((9, 8, 3), np.uint8)
        for i in range(len(images)):
            problem = decode.attempt(images.store.read_into)(pixels, i)[1]
            if problem:
                raise DataError(problem)


def peak() -> int:
    """Return the peak resident memory in bytes; getrusage's includes the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(kind: str, seed: int, count: int, folder: Path) -> None:
    global watching
    path, draw, marker = build(kind, folder), random.Random(seed), folder / "executed"
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if "pairs" in kind or kind in ("templates", "parquet-paths"):  # not the images themselves
        files = [file for file in files if file.suffix in (".txt", ".csv", ".parquet")]
    sound = {file: file.read_bytes() for file in files}
    for file in files:
        read(kind, path, file)
    before = peak()
    sys.addaudithook(watch)
    watching = True
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    errors: Counter[str] = Counter()
    fine = 0
    for _ in range(count):
        file = draw.choice(files)
        content = sound[file]
        if kind == "webdataset-gz" and file.suffix == ".gz" and draw.random() < 0.5:
            content = gzip.compress(mutated(gzip.decompress(content), draw), 1, mtime=0)
        else:
            content = mutated(content, draw)
        if kind == "bin" and draw.random() < 0.2:
            at = draw.randrange(len(content) + 1)
            content = content[:at] + hostile(marker, draw) + content[at:]
        file.write_bytes(content)
        try:
            read(kind, path, file)
            fine += 1
        except (DataError, OSError) as error:
            errors[type(error).__name__ if str(error) else "empty"] += 1
        finally:
            file.write_bytes(sound[file])
    watching = False
    assert not marker.exists(), "executed"
    found = {"fine": fine, "errors": dict(errors), "grown": peak() - before}
    print(json.dumps(found))
