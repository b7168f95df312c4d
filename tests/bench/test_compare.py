"""`synface bench compare`: losses, what else differs, and files that are no results."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from synface.bench import compare

from benchmarks import growth, machine, table
from benchmarks.peers import PEERS
from benchmarks.process import RESULTS
from tests.helpers.command_line import call, refused

COMMITTED = sorted(RESULTS.glob("*.json"))
CASE = "N=2 D=3 C=4 float32"


def row(peer="ours", seconds=1.0, ratio=1.0, peak=100 << 20, **other):
    return {"peer": peer, "seconds": seconds, "ratio": ratio, "peak_bytes": peak} | other


FLOOR = row("three products", 0.8, 0.8)


def case(*peers, op="margin_cross_entropy", name=CASE, **other):
    return {"op": op, "name": name, "idle": True, "peers": list(peers)} | other


def content(*cases, **machine):
    about = {"processor": "P", "cores": 2, "system": "Linux", "threads": 2, "torch": "2.13.0"}
    return {"format": 1, "machine": about | machine, "cases": list(cases)}


@pytest.fixture
def files(tmp_path):
    """Return a function that writes results A and B, and returns their paths."""

    def write(*contents):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, each in zip(paths, contents, strict=True):
            path.write_text(each if isinstance(each, str) else json.dumps(each))
        return paths

    return write


def run(files, a, b, *options, code=0):
    return call("bench", "compare", *files(a, b), *options, code=code)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_lose_nothing_against_themselves(path):
    shown = call("bench", "compare", path, path)
    assert "1.00×" in shown
    assert "\n0 of " in shown
    assert "LOSS" not in shown
    warnings = [line for line in shown.splitlines() if line.startswith("warning")]
    assert all("were measured while other programs ran" in line for line in warnings)


def test_a_loss_is_judged_by_the_ratio_to_the_floor_of_the_same_run(files):
    before = content(case(row(), FLOOR))
    # All of the machine is twice as slow: no loss by ratio, one by time.
    after = content(case(row(seconds=2.0), row("three products", 1.6, 0.8)))
    shown = run(files, before, after)
    assert "1.00 s → 2.00 s (2.00×)  1.25 → 1.25 × three products (1.00×)" in shown
    assert "LOSS: time 2.00×" in run(files, before, after, "--by", "time", code=1)
    # Ours alone is slower.
    after = content(case(row(seconds=1.2), row("three products", 0.8, 0.8 / 1.2)))
    shown = run(files, before, after, code=1)
    assert "1.25 → 1.50 × three products (1.20×)" in shown
    assert "LOSS: time 1.20×" in shown
    assert "1 of 1 rows lose over 10% of time ÷ a peer's in the same run" in shown
    run(files, before, after, "--tolerance", "0.25")
    run(files, after, before)


def test_a_loss_of_memory(files):
    before = content(case(row(peak=100 << 20), FLOOR))
    shown = run(files, before, content(case(row(peak=120 << 20), FLOOR)), code=1)
    assert "100 → 120 MiB (1.20×)  LOSS: memory 1.20×" in shown
    run(files, before, content(case(row(peak=108 << 20), FLOOR)))
    small = content(case(row(peak=0), FLOOR))
    run(files, small, content(case(row(peak=compare.MEMORY_NOISE), FLOOR)))
    assert "memory inf×" in run(files, small, before, code=1)
    assert "memory not measured" in run(files, small, content(case(row(peak=None), FLOOR)))


def test_every_row_of_ours_is_compared(files):
    before = content(case(row(), FLOOR, row("ours, workspace", 0.9, 0.9)))
    after = content(case(row(), FLOOR, row("ours, workspace", 1.1, 1.1)))
    assert "LOSS: time 1.22×" in run(files, before, after, code=1)
    after["cases"][0]["peers"].pop()
    shown = run(files, before, after, code=1)
    assert f"LOSS: margin_cross_entropy, {CASE}, ours, workspace: not measured in B" in shown
    assert "it has no such row" in shown
    assert "1 of 2 rows lose over" in shown
    assert "ours, workspace: not measured in A" in run(files, after, before)


@pytest.mark.parametrize(
    "lost",
    [
        case({"peer": "ours", "not_measured": "RuntimeError: broken"}, FLOOR),
        case(not_measured="no time was left"),
    ],
)
@pytest.mark.parametrize("by", compare.BY)
def test_a_row_that_is_not_measured_again_is_a_loss(by, lost, files):
    good, whole = case(row(), FLOOR), case(row(), FLOOR, name="another")
    shown = run(files, content(good, whole), content(lost, whole), "--by", by, code=1)
    assert f"LOSS: margin_cross_entropy, {CASE}, ours: not measured in B: " in shown
    assert "1 of 2 rows lose over" in shown
    assert "1 of 1 rows lose over" in run(files, content(good), content(lost), code=1)
    shown = run(files, content(good, whole), content(good), "--by", by)
    assert shown.splitlines()[-1].endswith("1 cases are only in A")
    assert "not compared: margin_cross_entropy, another: only in A" in shown


def test_nothing_that_can_be_judged_is_an_error(files):
    alone = content(case(row()))
    text = refused("bench", "compare", *files(alone, alone))
    assert "nothing can be judged: none of 1 rows of ours has a reference" in text
    assert "1 have no such time" in run(files, alone, content(case(row(peak=200 << 20))), code=1)
    assert "0 of 1 rows lose" in run(files, alone, alone, "--by", "time")


def test_ratios_that_say_less_are_warned_of(files):
    eager = row("eager torch", 5.0, 5.0)
    absent = {"peer": "three products", "not_measured": "ImportError"}
    other = case(row(), eager, FLOOR, name="another")
    a, b = content(case(row(), eager, FLOOR), other), content(case(row(), eager, absent), other)
    shown = run(files, a, b)
    assert shown.count("warning") == 1
    line = f"warning: margin_cross_entropy, {CASE}: its floor was not measured in both, so 'eager"
    assert line in shown
    assert "warning" not in run(files, a, b, "--reference", "eager torch")
    for seconds, times in ((1.0, "1.25"), (0.4, "0.50")):
        both = (row(seconds=seconds / 0.8), row("three products", seconds, 0.8))
        moved = content(case(*both, row("ours, workspace")), other)
        shown = run(files, content(case(row(), FLOOR, row("ours, workspace")), other), moved)
        line = f"the time of 'three products' itself is {times}× as long in B, so ratios to it say"
        assert shown.count(line) == 1
        assert "warning" not in run(files, a, moved, "--tolerance", "1.1")


def test_the_reference_is_the_floor_or_what_both_have(files):
    eager = row("eager torch", 5.0, 5.0)
    absent = {"peer": "three products", "not_measured": "ImportError"}
    a, b = content(case(row(), FLOOR, eager)), content(case(row(), absent, eager))
    assert "0.20 → 0.20 × eager torch" in run(files, a, b)
    assert "0.20 → 0.20 × eager torch" in run(files, a, a, "--reference", "eager torch")
    other = case(row(), FLOOR, name="another")
    a, b = ({**each, "cases": [*each["cases"], other]} for each in (a, b))
    shown = run(files, a, b, "--reference", "three products")
    assert "no peer was measured in both" in shown
    assert "1 have no such time" in shown
    text = refused("bench", "compare", *files(a, b), "--reference", "Liger")
    assert "--reference must be a peer such as ['eager torch', 'three products']" in text


def test_every_op_has_the_floor_that_the_benchmarks_name():
    for op, peers in PEERS.items():
        floor = growth.floor_of(op)
        assert [peer.name for peer in peers if peer.name in compare.FLOORS] == [floor], op
        assert floor == next(peer.name for peer in peers if not peer.name.startswith(compare.OURS))
    assert {*compare.FLOORS} == {growth.floor_of(op) for op in PEERS} <= {*table.BOUNDS}


def test_durations_have_the_unit_of_what_is_shown():
    shown = {
        0.9996: "1.00 s", 0.9994: "999 ms", 1.0: "1.00 s", 2.034: "2.03 s", 0.00535: "5.35 ms",
        0.0009996: "1 ms", 0.0009994: "999 µs", 12.1e-6: "12.1 µs",
    }  # fmt: skip
    for seconds, text in shown.items():
        assert compare.duration(seconds) == table.duration(seconds) == text


def test_what_only_one_file_measured_is_listed(files):
    other = case(row(), FLOOR, name="another")
    slow = {"peer": "ours", "not_measured": "one step took 31 s,\n limit 10 s"}
    hung = case(op="domain_mixup", not_measured="no time was left")
    a = content(case(row(), FLOOR), case(slow, op="row_update"), hung, other)
    b = content(case(row(), FLOOR), case(row(), op="row_update"), hung, case(op="new", name="new"))
    shown = run(files, a, b)
    for line in (
        f"not compared: row_update, {CASE}, ours: not measured in A: one step took 31 s,",
        "not measured in A: no time was left; not measured in B: no time was left",
        "not compared: margin_cross_entropy, another: only in A",
        "not compared: new, new: only in B",
        "4 are not compared",
    ):
        assert line in shown


def test_other_versions_and_threads_are_warnings_and_other_machines_errors(files):
    a = content(case(row(), FLOOR)) | {"commit": "abc"}
    b = content(case(row(), FLOOR, idle=False), torch="2.14.0", threads=1)
    b["cases"][0]["idle"] = False
    shown = run(files, a, b)
    assert "warning: torch is '2.13.0' in A and '2.14.0' in B" in shown
    assert "warning: threads is '2' in A and '1' in B" in shown
    assert "warning: commit is 'abc' in A and 'not recorded' in B" in shown
    assert "warning: 1 of 1 cases of B were measured while other programs ran" in shown
    c = content(case(row(), FLOOR), processor="Q", device="GPU")
    text = refused("bench", "compare", *files(a, c))
    assert "of different machines: processor is 'P' in A and 'Q' in B; --across-machines" in text
    shown = run(files, a, c, "--across-machines")
    assert "warning: processor is 'P' in A and 'Q' in B" in shown
    assert "warning: device is 'not recorded' in A and 'GPU' in B" in shown


def changed(place, value):
    """Return results in which one value of the first case, or of its first peer, is another."""
    made = content(case(row(), FLOOR))
    where = {"top": made, "machine": made["machine"], "case": made["cases"][0]}
    where["peer"] = made["cases"][0]["peers"][0]
    name, key = place.split(".")
    where[name][key] = value
    return json.dumps(made)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "a.json is damaged: it is not whole JSON"),
        ("[" * 100_000, "a.json is damaged: it is not whole JSON: it is nested too deeply"),
        ("[]", "a.json: its content must be a JSON object, got list []"),
        ("{}", "a.json: machine must be a JSON object, got nothing"),
        (changed("top.format", 2), "a.json: format must be 1, got 2"),
        (changed("top.cases", {}), "a.json: cases must be a list, got dict {}"),
        (changed("top.cases", []), "have no case in common"),
        (changed("top.cases", [1]), "a.json: cases[0] must be a JSON object, got int 1"),
        (changed("machine.processor", None), "a.json: machine.processor is missing"),
        (changed("machine.torch", ["2"]), "machine.torch must be a short printable text"),
        (changed("case.op", None), "cases[0].op must be a short printable text, got nothing"),
        (changed("case.name", "\x1b[2J"), "cases[0].name must be a short printable text"),
        (changed("case.peers", None), "cases[0].peers must be a list, got nothing"),
        (changed("case.peers", [row(), row()]), "cases[0].peers[1] is the second peer 'ours'"),
        (changed("peer.seconds", "1"), "peers[0].seconds must be a number, got str '1'"),
        (
            changed("peer.seconds", math.nan),
            "seconds must be finite and > 0, got float nan",
        ),
        (
            changed("peer.seconds", math.inf),
            "seconds must be finite and > 0, got float inf",
        ),
        (changed("peer.seconds", -1), "peers[0].seconds must be finite and > 0, got int -1"),
        (changed("peer.seconds", 0), "peers[0].seconds must be finite and > 0, got int 0"),
        (changed("peer.seconds", True), "peers[0].seconds must be a number, got bool True"),
        (changed("peer.seconds", None), "peers[0] must have either seconds or not_measured"),
        (changed("peer.ratio", 0), "peers[0].ratio must be finite and > 0"),
        (changed("peer.peak_bytes", -1), "peers[0].peak_bytes must be finite and ≥ 0"),
        (changed("peer.ratio", 10**400), "peers[0].ratio must be finite and > 0"),
        (json.dumps(content(case(row()), case(row()))), "cases[1] is the second case"),
        (" " * (compare.MAX_BYTES + 1), f"must have at most {compare.MAX_BYTES:,} bytes"),
    ],
)
def test_files_that_are_no_results(text, problem, files):
    shown = refused("bench", "compare", *files(text, content(case(row(), FLOOR))))
    assert problem in shown
    assert len(shown.splitlines()) == 1


def test_files_and_options_that_are_refused(files, tmp_path):
    good = files(content(case(row(), FLOOR)), content(case(row(), FLOOR)))
    missing = tmp_path / "c.json"
    assert f"{missing} cannot be read: No such file" in refused(
        "bench", "compare", *good[:1], missing
    )
    assert "must be a regular file" in refused("bench", "compare", *good[:1], os.devnull)
    assert "--by must be one of ratio, time, got 'x'" in refused(
        "bench", "compare", *good, "--by", "x"
    )
    assert "--tolerance must be" in refused("bench", "compare", *good, "--tolerance", "-1")
    assert "--tolerance must be" in refused("bench", "compare", *good, "--tolerance", "nan")
    none = {"peer": "ours", "not_measured": "no time was left"}
    text = refused("bench", "compare", *files(content(case(none)), content(case(row()))))
    assert "share no row of ours that both measured" in text


def test_it_compares_without_torch():
    code = (
        "import sys; sys.argv = ['synface', 'bench', 'compare', *sys.argv[1:]]\n"
        "from synface.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    path = str(COMMITTED[0])
    command = [sys.executable, "-c", code, path, path]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "False"


def test_the_commit_of_a_run(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", machine.commit())
    monkeypatch.setattr(machine, "ROOT", Path("/nowhere"))
    assert machine.commit() == "unknown"


def test_only_sources_make_a_commit_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        about = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *about, *arguments], check=True)

    source, result = tmp_path / "a.py", tmp_path / "benchmarks" / "results" / "a.json"
    result.parent.mkdir(parents=True)
    git("init", "-q")
    for path in (source, result):
        path.write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    result.write_text("2")
    clean = machine.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    source.write_text("2")
    assert machine.commit() == f"{clean}-dirty"
