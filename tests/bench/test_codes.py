"""The table of known codes is right, and synface bench codes measures the packer against it."""

import json
import math

import pytest
from synface.bench import code_report
from synface.bench.codes import CODES, KnownCode, select
from synface.synthesis.packing import Packer, bounds

from tests.helpers import codes
from tests.helpers.command_line import call, refused

TABLE = {(code.count, code.dim): code for code in CODES}
# Least angles in degrees, from Sloane, Hardin and Smith's tables: all digits that these give.
SLOANE = {
    7: 77.8695421, 8: 74.8584922, 9: 70.5287794, 10: 66.1468220, 11: 63.4349488, 12: 63.4349488,
    13: 57.1367031, 14: 55.6705700, 15: 53.6578501, 16: 52.2443957, 17: 51.0903285,
    18: 49.5566548, 19: 47.6919141, 20: 47.4310362, 21: 45.6132231, 22: 44.7401612,
    23: 43.7099642, 24: 43.6907671,
}  # fmt: skip
NAMES = ["codes-excess.png", "codes.json", "codes.md"]


def test_no_code_is_in_the_table_twice():
    assert len(TABLE) == len(CODES) > 40
    assert all(code.source and code.count > code.dim > 2 for code in CODES)


@pytest.mark.parametrize("name", codes.BUILT)
def test_a_construction_has_the_tables_worst_cosine(name):
    points = codes.BUILT[name]()
    assert points.shape == name
    assert (points.norm(dim=1) - 1).abs().max() < 1e-12
    worst = (points @ points.T).fill_diagonal_(-2).max().item()
    assert worst == pytest.approx(TABLE[name].cosine, abs=1e-12)


def test_codes_without_a_construction_are_few():
    """Tammes' are compared with their tables, and (325, 52) attains the bound."""
    others = {name for name in TABLE if name not in codes.BUILT and name[1] > 3}
    assert others == {(40, 10), (325, 52)}
    assert bounds.levenshtein(325, 52) == pytest.approx(1 / 16, abs=1e-12)


@pytest.mark.parametrize(("count", "angle"), SLOANE.items())
def test_tammes_cosines_are_those_of_the_tables_angles(count, angle):
    found = math.degrees(math.acos(TABLE[count, 3].cosine))
    assert found == pytest.approx(angle, abs=6e-8)
    if count in codes.TAMMES:
        assert found == pytest.approx(codes.TAMMES[count], abs=1e-4)


def test_cosines_with_a_polynomial_are_its_roots():
    """Cohn's table of spherical codes has the polynomials."""
    x = TABLE[7, 3].cosine
    assert 3 * x**3 - 9 * x**2 - 3 * x + 1 == pytest.approx(0, abs=1e-14)
    x = TABLE[15, 3].cosine
    assert 13 * x**5 - x**4 + 6 * x**3 + 2 * x**2 - 3 * x - 1 == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{code.count},{code.dim}")
def test_no_bound_exceeds_a_known_code(code):
    for bound in bounds.certificate(code.count, code.dim):
        assert bound.cosine <= code.cosine + 1e-12, bound
    sharp = ("Levenshtein", "Rankin") if "Cohn and Kumar" in code.source else ()
    if sharp:
        bound = bounds.certificate(code.count, code.dim)[0]
        assert bound.name in sharp
        assert bound.cosine == pytest.approx(code.cosine, abs=1e-12)


def test_selection():
    assert select() == list(CODES)
    assert select(["24,4", " 10, 3", "24,4"]) == [TABLE[24, 4], TABLE[10, 3]]
    assert {code.count for code in select(dim=4)} == {10, 24, 120}
    assert select(["24,4", "10,3"], 3) == [TABLE[10, 3]]
    for text in ("24", "24,4,1", "24,-4", "x,4", "²,4", ""):
        with pytest.raises(ValueError, match="--code must be N,d such as 24,4, got "):
            select([text])
    with pytest.raises(ValueError, match="25,4 is not in the table; of 4 dimensions: 10, 24, 120 "):
        select(["25,4"])
    with pytest.raises(ValueError, match="9,99 is not in the table; of 99 dimensions: none"):
        select(["9,99"])
    with pytest.raises(ValueError, match=r"dimension of the codes, 3, 4, 5, .*, got 99"):
        select(dim=99)


@pytest.mark.slow
def test_the_best_of_the_seeds_is_reported():
    code = KnownCode(8, 3, TABLE[8, 3].cosine, "two squares")
    row = code_report.measure(code, range(3, 6))
    assert json.loads(json.dumps(row)) == row
    assert [run["seed"] for run in row["runs"]] == [3, 4, 5]
    best = min(row["runs"], key=lambda run: run["cosine"])
    assert (row["found"], row["seed"]) == (best["cosine"], best["seed"])
    assert row["excess"] == row["found"] - code.cosine
    assert row["excess"] > -1e-12
    assert row["seconds"] == sum(run["seconds"] for run in row["runs"])
    assert tuple(row["bound"].values()) == bounds.certificate(8, 3)[0]
    assert row["gap"] == row["found"] - row["bound"]["cosine"] > 0
    assert "seed" not in row["config"]
    line = code_report.summary(row)
    assert "8 points in 3 dimensions" in line
    assert row["bound"]["name"] in line


@pytest.mark.slow
def test_a_report_from_the_command_line(tmp_path):
    call_of = ["bench", "codes", "--code", "9,8", "--code", "7,3", "--output", tmp_path]
    said = call(*call_of)
    assert "9 points in 8 dimensions: -0.12" in said
    assert "Of 2 codes the packer finds 2 to 0.0001" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    result = json.loads((tmp_path / "codes.json").read_text())
    assert [(row["count"], row["dim"]) for row in result["codes"]] == [(7, 3), (9, 8)]
    assert "torch" in result["machine"]
    page = (tmp_path / "codes.md").read_text()
    assert "Written by `synface bench codes --code 9,8 --code 7,3`" in page
    assert "| 9 | 8 | -0.12500000 |" in page
    assert "simplex; optimal (Rankin 1955)" in page
    assert (tmp_path / "codes-excess.png").read_bytes().startswith(b"\x89PNG")

    assert "codes.json exists: --resume adds" in refused(*call_of)
    before = result["codes"]
    said = call(*call_of, "--code", "10,4", "--resume")
    assert "10 points in 4" in said
    assert "9 points in 8" not in said
    result = json.loads((tmp_path / "codes.json").read_text())
    assert [row["count"] for row in result["codes"]] == [7, 10, 9]
    assert [row for row in result["codes"] if row["count"] != 10] == before
    assert "Of 3 codes" in call(*call_of, "--resume")  # nothing is left to do
    said = refused(*call_of, "--resume", "--seeds", 2)
    assert "the seeds of 7,3 were [0], and are [0, 1] now: --overwrite" in said
    said = refused(*call_of, "--resume", "--overwrite")
    assert "--overwrite has no effect with --resume" in said
    call("bench", "codes", "--code", "9,8", "--output", tmp_path, "--overwrite", "--seed", 1)
    result = json.loads((tmp_path / "codes.json").read_text())
    assert [(row["count"], row["seed"]) for row in result["codes"]] == [(9, 1)]
    assert result["command"] == "synface bench codes --code 9,8 --seed 1"


@pytest.mark.slow
def test_ctrl_c_keeps_the_codes_that_are_done(tmp_path, monkeypatch):
    run = Packer.run

    def interrupted(self, *args, **kwargs):
        if self.config.count == 9:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Packer, "run", interrupted)
    command = ["bench", "codes", "--code", "7,3", "--code", "9,8", "--output", tmp_path]
    said = call(*command, code=130)
    assert f"continue with synface bench codes --code 7,3 --code 9,8 --output {tmp_path}" in said
    rows = json.loads((tmp_path / "codes.json").read_text())["codes"]
    assert [row["count"] for row in rows] == [7]
    monkeypatch.undo()
    assert "Of 2 codes" in call(*command, "--resume")


def test_reports_that_cannot_be_resumed(tmp_path):
    command = ["bench", "codes", "--code", "9,8", "--output", tmp_path, "--resume"]
    assert "codes.json does not exist: there is nothing to resume" in refused(*command)
    file = tmp_path / "codes.json"
    file.write_text("{")
    assert "codes.json is damaged" in refused(*command)
    for text in ("[]", '{"codes": [1]}', '{"codes": [{"count": 9, "dim": 8}]}'):
        file.write_text(text)
        assert "codes.json is no report of `synface bench codes`" in refused(*command)
    assert "--code 9,9 is not in the table" in refused("bench", "codes", "--code", "9,9")
    assert "--dim must be a dimension of the codes" in refused("bench", "codes", "--dim", "2")
