"""Records that MXNet itself wrote, and ours against them, byte for byte."""

from __future__ import annotations

from pathlib import Path

from synface.data.formats import recordio
from synface.data.formats.images import Sample

WRITTEN = Path(__file__).parent / "files" / "mxnet"
MAGIC = recordio.MAGIC


def test_mxnet_records_are_read():
    listed = recordio.list_images(WRITTEN)
    assert listed.labels.tolist() == [0, 0, 0, 1, 1, 1]
    contents = [listed.store.read(row) for row in range(6)]
    assert [content.count(MAGIC) for content in contents] == [0, 0, 1, 0, 0, 3]
    assert all(content.startswith(b"\x89PNG") for content in contents)


def test_our_records_are_mxnets(tmp_path):
    """The same bytes, where an image has one label."""
    listed = recordio.list_images(WRITTEN)
    samples = [
        Sample(int(y), listed.store.read(i), ".png", (4, 4)) for i, y in enumerate(listed.labels)
    ]
    recordio.write(tmp_path, iter(samples), ["a", "b"], 0)

    def records(folder: Path) -> dict[int, bytes]:
        rows = [line.split() for line in (folder / "train.idx").read_text().splitlines()]
        begins = sorted(int(at) for _, at in rows)
        ends = dict(zip(begins, [*begins[1:], None], strict=True))
        content = (folder / "train.rec").read_bytes()
        return {int(key): content[int(at) : ends[int(at)]] for key, at in rows}

    ours, theirs = records(tmp_path), records(WRITTEN)
    assert sorted(ours) == sorted(theirs) == list(range(9))
    one_label = [2, 4, 6]
    assert [ours[key] for key in (0, *one_label, 7, 8)] == [
        theirs[key] for key in (0, *one_label, 7, 8)
    ]
