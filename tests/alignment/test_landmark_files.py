"""Landmarks in CSV and JSON files, and the errors that name what is wrong in them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synface.alignment import read_landmarks
from synface.data import DataError

POINTS = [[38.5, 51.0], [73.0, 51.5], [56.0, 71.7], [41.5, 92.3], [70.7, 92.2]]
NUMBERS = ",".join(str(x) for point in POINTS for x in point)
HEADER = "path,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", f"{HEADER}\ns1/a.jpg,{NUMBERS}\nb.png,{NUMBERS}\n"),
        ("a.csv", f"s1/a.jpg,{NUMBERS}\n\nb.png,{NUMBERS.replace(',', ' , ')}"),
        ("a.txt", f'\ufeff{HEADER}\r\n./s1/a.jpg,{NUMBERS}\r\n"b.png",{NUMBERS}\r\n'),
        ("a.csv", f"s1\\a.jpg,{NUMBERS}\nb.png,{NUMBERS}\n"),
        ("a.json", json.dumps({"s1/a.jpg": POINTS, "b.png": np.ravel(POINTS).tolist()})),
    ],
)
def test_files_are_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    found = read_landmarks(tmp_path / name, {"s1/a.jpg", "b.png", "c.png"})
    assert list(found) == ["s1/a.jpg", "b.png"]
    for points in found.values():
        np.testing.assert_array_equal(points, POINTS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", f"{HEADER}\na.png,{NUMBERS},7\n", r"a\.csv, line 2: expected 11 columns.*got 12"),
        ("a.csv", f"a.png,{NUMBERS}\nb.png,1,2\n", r"a\.csv, line 2: expected 11 columns.*got 3"),
        ("a.csv", f"a.png,{NUMBERS[:-4]}inf\n", r"a\.csv, line 1: .*number of pixels, got 'inf'"),
        ("a.csv", f"a.png,{NUMBERS[:-4]}9_2\n", r"a\.csv, line 1: .*number of pixels, got '9_2'"),
        ("a.csv", f"{HEADER}\na.png,x{NUMBERS}\n", r"a\.csv, line 2: .*got 'x38.5'"),
        ("a.csv", f"a.png,{NUMBERS[4:]}\n", r"line 1: .*number of pixels, got ''"),
        ("a.csv", f"{HEADER}\n{HEADER}\n", r"a\.csv, line 2: .*got 'x1'"),
        ("a.csv", f"a.png,{NUMBERS}\na.png,{NUMBERS}\n", r"a\.csv, line 2: 'a.png' is named twice"),
        ("a.csv", f"a.png,{NUMBERS}\nd/z.png,{NUMBERS}\n", r"line 2: 'd/z.png' is none of the 2"),
        ("a.csv", "a.png" + ",5" * 10, r"a\.csv, line 1: landmarks must be 5 different points"),
        ("a.csv", f"a.png,1e9{NUMBERS[4:]}\n", r"a\.csv, line 1: .*finite pixel coordinates"),
        ("a.csv", HEADER, r"a\.csv has no landmarks"),
        ("a.csv", "", r"a\.csv has no landmarks"),
        ("a.json", "[1]", r"a\.json must map paths to five points, got a list"),
        ("a.json", '{"a.png": [[1, 2]]}', r"a\.json, 'a.png': .*shape \(1, 2\)"),
        ("a.json", '{"a.png": "x"}', r"a\.json, 'a.png': "),
        ("a.json", '{"a.png": [[1, 2], [3]]}', r"a\.json, 'a.png': "),
        ("a.json", json.dumps({"z.png": POINTS}), r"a\.json, 'z.png': 'z.png' is none"),
        ("a.json", f'{{"a.png": {POINTS}, "a.png": {POINTS}}}', r"a\.json, 'a.png': .*named twice"),
        ("a.json", '{"a.png": [', r"a\.json is damaged: .*line 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_landmarks(tmp_path / name, {"a.png", "b.png"})


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        read_landmarks(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"x\.csv is not UTF-8"):
        read_landmarks(tmp_path / "x.csv")
