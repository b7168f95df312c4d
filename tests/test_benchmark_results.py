"""The committed results are what the documentation shows: tables, growth and pictures."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import growth, peers, pictures, roofline, table
from benchmarks.cases import CASES, HEADLINES, cases, domain_mixup
from benchmarks.peers import Peer
from tests.helpers.command_line import call
from tests.helpers.figures import drawn, legends_on_data, overlapping_texts, unlabeled

MARGIN, MIXUP = "margin_cross_entropy", "domain_mixup"
CEILINGS = {
    "copy_gigabyte_per_second": 20.0,
    "product": "bfloat16",
    "product_tflop_per_second": 0.4,
    "float32_tflop_per_second": 0.2,
}


def result(processor, *measured, **machine):
    about = {"processor": processor, "cores": 2, "instruction_set": "avx2", "torch": "2.13"}
    return {
        "machine": about | machine,
        "date": "2026-01-01",
        "command": "make bench",
        "ceilings": {**CEILINGS},
        "cases": list(measured),
    }


def measured(op, number, *rows, suite="cpu"):
    case = cases(suite, op)[number]
    fields = {name: getattr(case, name) for name in ("op", "name", "dtype", "flops", "bytes")}
    other = {"idle": True, "shape": dict(case.shape), "options": list(case.options)}
    return {**fields, **other, "gemm_dtype": case.dtype, "peers": list(rows)}


def row(peer, seconds, ratio=1.0, peak=1 << 20):
    return {"peer": peer, "seconds": seconds, "ratio": ratio, "peak_bytes": peak}


def write(folder, **results):
    for name, each in results.items():
        (folder / f"{name}.json").write_text(json.dumps(each))


# ---- tables --------------------------------------------------------------------------------------


def test_the_documentation_shows_the_committed_results(tmp_path, monkeypatch):
    text, page = table.README.read_text(), table.PAGE.read_text()
    assert table.headline() in text
    assert page == table.page()
    assert table.render() in page
    assert table.summary() in page

    copies = {"README": tmp_path / "README.md", "PAGE": tmp_path / "benchmarks.md"}
    for wrong in copies:
        copies["README"].write_text(text)
        copies["PAGE"].write_text(page)
        copies[wrong].write_text(copies[wrong].read_text().replace(" MiB |", " GiB |"))
        for name, path in copies.items():
            monkeypatch.setattr(table, name, path)
        monkeypatch.setattr(sys, "argv", ["table", "--check"])
        with pytest.raises(SystemExit, match="does not show"):
            table.main()
        monkeypatch.setattr(sys, "argv", ["table"])
        monkeypatch.setattr(pictures, "draw_all", lambda: None)
        table.main()
        assert copies["README"].read_text() == text
        assert copies["PAGE"].read_text() == page


def test_machines_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    slow = {"peer": "F.linear_cross_entropy", "not_measured": "one step took 31 s, limit 10 s"}
    floor = row("three products", 1.5, 0.75)
    write(
        tmp_path,
        amd=result(
            "AMD EPYC",
            measured(MARGIN, 0, row("ours", 2.0), floor, row(slow["peer"], 2.4, 1.2)),
            measured(MIXUP, 1, row("ours", 0.005), row("eager torch", 0.2, 40.0)),
        ),
        intel=result("Intel Xeon", measured(MARGIN, 0, row("ours", 1.0, peak=2 << 30), slow)),
    )
    text = table.summary()
    for line in (
        "|  | AMD EPYC, 2 cores, avx2 | Intel Xeon, 2 cores, avx2 |",
        "| **N=512 D=512 C=200,000 float32** | **2.00 s**, 1 MiB | **1.00 s**, 2.0 GiB |",
        "| three products | 0.75×, 1 MiB | not measured |",
        "| F.linear_cross_entropy | 1.20×, 1 MiB | not measured |",
        "| **C=400,000 S=40,000 D=512 float32 sgd** | not measured | not measured |",
    ):
        assert line in text.splitlines(), line
    assert text.endswith("On a GPU: not measured.")
    assert "On an Intel processor" not in text
    shown = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(shown) == sum(HEADLINES.values())
    (tmp_path / "intel.json").unlink()
    assert table.summary().endswith("On an Intel processor: not measured. On a GPU: not measured.")


def test_a_gpu_has_tables_of_its_own_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    case = measured(MARGIN, 0, row("ours", 0.002), suite="gpu")
    write(tmp_path, gpu=result("Intel Xeon", case, device="GPU X", cuda="13.0"))
    text = table.summary()
    assert "|  | GPU X, CUDA 13.0 |" in text
    assert "| **N=512 D=512 C=1,000,000 bfloat16** | **2 ms**, 1 MiB |" in text
    assert "N=512 D=512 C=200,000" not in text
    assert text.endswith("On an AMD processor: not measured. On an Intel processor: not measured.")


def test_later_headlines_show_the_floor_and_the_fastest_implementation(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    floor = row("copy_ that moves as many bytes", 0.004, 0.8)
    others = [row("torch.compile", 0.03, 6.0), row("eager torch", 0.2, 40.0)]
    both = [measured(MIXUP, n, row("ours", 0.005), floor, *others) for n in (0, 1)]
    write(tmp_path, amd=result("AMD", *both))
    assert table.summary().count("| eager torch | 40.00×") == 1
    assert table.summary().count("| torch.compile | 6.00×") == 2
    assert table.summary().count("| copy_ that moves as many bytes | 0.80×") == 2


def test_readme_has_a_row_of_each_op_and_a_table_of_each_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    peers = (
        row("three products", 1.5, 0.75),
        row("eager torch", 12.0, 6.0, peak=4 << 30),
        {"peer": "torch.compile", "not_measured": "one step took 31 s, limit 10 s"},
        row("ours, workspace", 2.2, 1.1),
        row("F.linear_cross_entropy", 2.4, 1.2),
    )
    amd = result("AMD EPYC", measured(MARGIN, 0, row("ours", 2.0), *peers))
    gpu_case = measured(MARGIN, 0, row("ours", 0.002), suite="gpu")
    write(tmp_path, amd=amd, gpu=result("Intel Xeon", gpu_case, device="GPU X", cuda="13.0"))
    lines = table.headline().splitlines()
    assert (
        "| `margin_cross_entropy`, N=512 D=512 C=200,000 float32 | **2.00 s**, 1 MiB "
        "| three products: 0.75×, 1 MiB | 6.00×, 4.0 GiB | – | not measured "
        "| F.linear_cross_entropy: 1.20×, 1 MiB |"
    ) in lines
    name = "`margin_cross_entropy`, N=512 D=512 C=1,000,000 bfloat16"
    assert f"| {name} | **2 ms**, 1 MiB | – | – | – | – | – |" in lines
    for op in CASES:
        rows = [line for line in lines if line.startswith(f"| `{op}`, ")]
        assert len(rows) == 2
        assert {line.count("|") for line in rows} == {8}
        assert op == MARGIN or all("| not measured |" in line for line in rows)
    assert lines[-1] == "On an Intel processor: not measured."


def test_numbers_are_rounded_without_an_exponent():
    assert [table.rounded(x, 3) for x in (1254.0, 0.66666, 12.0, 3_141_592)] == [
        "1,250", "0.667", "12", "3,140,000",
    ]  # fmt: skip
    assert [table.rounded(x, 2) for x in (99.96, 0.0000123, 5.0)] == ["100", "0.000012", "5"]


def test_every_floor_is_a_bound():
    for op in CASES:
        assert growth.floor_of(op) in table.BOUNDS


def test_ceilings_of_a_cpu_are_shown():
    text = table.one_machine(result("P"))
    assert "a copy at 20 GB/s, a product (bfloat16) at 400 GFLOP/s, in float32 at 200." in text


def test_the_page_shows_kernels_settings_and_replays_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    about = {"op": MARGIN, "name": "N=512"}
    tiled = {"design": "tiled", "workspace_mib": 16, "seconds": 0.006}
    fused = {"design": "fused", "workspace_mib": 64, "seconds": 0.005, "peak_bytes": 64 << 20}
    one, two = {"H": 1, "BLOCK_N": 64}, {"H": 2, "BLOCK_N": 128}
    gpu = result("Intel Xeon", device="GPU X", cuda="13.0") | {
        "profiles": [
            about | {
                "step_seconds": 0.005, "launches": 254.0, "kernel_seconds": 0.004,
                "kernels": [{"kernel": "_lse_kernel", "launches": 1.0, "seconds": 0.001}],
            },
            about | {"not_measured": "no time was left"},
        ],
        "sweeps": [about | {"settings": [tiled, fused], "fastest": fused}],
        "blocks": [
            about | {
                "settings": [
                    {"kernel": "lse", "blocks": two, "seconds": 0.002, "ratio": 1.0},
                    {"kernel": "lse", "blocks": one, "seconds": 0.0015, "ratio": 0.75},
                    {"kernel": "factor", "blocks": one, "not_measured": "out of resource"},
                ],
                "fastest": {"lse": one},
                "together": {"seconds": 0.004, "default_seconds": 0.005, "ratio": 0.8},
            },
            about | {"settings": [], "fastest": {}, "not_measured": "no time was left"},
        ],
        "replays": [
            about | {"eager_seconds": 0.005, "replay_seconds": 0.004, "same_bits_as_eager": True},
            about | {"not_measured": "no graph"},
        ],
    }  # fmt: skip
    write(tmp_path, cpu=result("AMD EPYC"), gpu=gpu)
    lines = table.page().splitlines()
    case = f"`{MARGIN}`, N=512"
    for line in (
        "## Kernels, settings and graphs on a GPU",
        "**GPU X, CUDA 13.0**",
        "| `_lse_kernel` | 1 | 1 ms | 25% |",
        f"{case}, its kernels: not measured: no time was left.",
        "| tiled | 16 MiB | 6 ms |  |",
        "| fused | 64 MiB | **5 ms** | 64 MiB |",
        "| lse | H 2, BLOCK_N 128 | 2 ms | 1.000 |",
        "| lse | H 1, BLOCK_N 64 | **1.5 ms** | 0.750 |",
        "| factor | H 1, BLOCK_N 64 | not measured: out of resource |  |",
        "Both passes take 5 ms by the default, 4 ms by the fastest blocks of all three kernels.",
        "Not measured: no time was left.",
        f"| {case} | 5 ms | 4 ms | yes |",
        f"| {case} | not measured: no graph |  |  |",
    ):
        assert line in lines, line
    (tmp_path / "gpu.json").unlink()
    assert "Kernels, settings" not in table.page()


# ---- growth --------------------------------------------------------------------------------------


def test_exponents_are_least_squares_on_logarithms():
    sizes = [10, 20, 40, 80]
    exponent, margin = growth.power_law(sizes, [3e-3 * n**1.5 for n in sizes])
    assert exponent == pytest.approx(1.5)
    assert margin == pytest.approx(0, abs=1e-6)
    noise = np.array([1.1, 0.9, 1.05, 0.95])
    exponent, margin = growth.power_law(sizes, np.array(sizes) * noise)
    x, y = np.log(sizes), np.log(np.array(sizes) * noise)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    rest = y - y.mean() - slope * (x - x.mean())
    error = math.sqrt((rest**2).sum() / 2 / ((x - x.mean()) ** 2).sum())
    assert exponent == pytest.approx(slope)
    assert margin == pytest.approx(4.302653 * error, rel=1e-5)  # Student's t, two degrees


def test_a_bend_is_where_a_fixed_time_equals_the_growing_one():
    sizes = [1, 2, 4, 8, 16]
    assert growth.bend(sizes, [2 + 0.5 * n for n in sizes], 1) == pytest.approx(4)
    assert growth.bend(sizes, [8 + 0.5 * n**2 for n in sizes], 2) == pytest.approx(4)
    assert growth.bend(sizes, [n - 0.1 for n in sizes], 1) is None


@pytest.mark.parametrize(
    ("exponent", "margin", "promise", "words"),
    [
        (0.97, 0.05, (0.9, 1.1), "1.0 ± 0.1: kept"),
        (0.97, 0.2, (0.9, 1.1), "1.0 ± 0.1: kept, but the interval reaches outside"),
        (1.11, 0.2, (0.9, 1.1), "1.0 ± 0.1: missed"),
        (1.9, 0.05, (0.0, 2.0), "≤ 2.0: kept"),
        (2.01, 0.05, (0.0, 2.0), "≤ 2.0: missed"),
        (2.0, 0.1, None, "–"),
    ],
)
def test_a_promise_is_kept_or_missed(exponent, margin, promise, words):
    series = replace(growth.SERIES["images"], promise=promise)
    fit = {"exponent": exponent, "interval": [exponent - margin, exponent + margin]}
    assert growth.verdict(series, fit) == words


def stand_ins(monkeypatch):
    """Measure a small series whose steps sleep longer for more images."""

    def sleeper(milliseconds):
        return lambda work: lambda: time.sleep(milliseconds * len(work.real) / 1e3)

    names = ("ours", "copy_ that moves as many bytes", "eager torch")
    found = [Peer(name, name, sleeper(i + 2), lambda case: 0) for i, name in enumerate(names)]
    monkeypatch.setitem(peers.PEERS, MIXUP, found)
    monkeypatch.setattr(growth.driver.machine, "idle_check", lambda seconds: {"idle": True})
    monkeypatch.setattr(growth, "require", lambda op: None)
    small = [domain_mixup("growth", b, 8, "float32", "contiguous") for b in (1, 2, 4, 8)]
    series = growth.Series("mixup over images", "8×8", "B", "image", small, 1, (0.5, 1.5), 2)
    steep = growth.Series("too steep", "8×8", "B", "image", small, 1, (1.9, 2.1), 1)
    monkeypatch.setattr(growth, "SERIES", {"images": series, "steep": steep})
    return series


def test_a_series_is_measured_and_fitted(monkeypatch):
    series = stand_ins(monkeypatch)
    found = growth.measure(series, rounds=3)
    assert [row["peer"] for row in found[0]["peers"]] == [p.name for p in peers.PEERS[MIXUP][:2]]
    fits = growth.fits(series, found)
    assert fits["ours"]["from"] == 2
    assert fits["ours"]["to"] == 8
    assert fits["ours"]["exponent"] == pytest.approx(1, abs=0.3)
    assert len(fits["ours"]["steps"]) == 3
    lines = growth.one_series(series, found).splitlines()
    assert lines[2].startswith("| B | ours | per image | copy_ that moves as many bytes |")
    assert [line.split(" ")[1] for line in lines[4:]] == ["1", "2", "4", "8"]
    fits = growth.fits(series, found[:2])
    assert fits["ours"] == {"not_measured": "1 sizes were measured"}


def test_a_result_of_growth_keeps_the_other_series(tmp_path, monkeypatch, capsys):
    stand_ins(monkeypatch)
    output = tmp_path / "growth" / "machine.json"

    def run(*arguments):
        command = ["growth", "--rounds", "1", "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        growth.main()
        return json.loads(output.read_text())

    assert {*run("--series", "images")["series"]} == {"images"}
    assert "| too steep | not measured |" in capsys.readouterr().out
    found = run("--series", "steep")
    assert [*found["series"]] == ["images", "steep"]
    assert len(found["cases"]) == 4  # of both series
    assert "2.0 ± 0.1: missed" in capsys.readouterr().out
    assert "0 of 4 rows lose" in call("bench", "compare", output, output)
    found["machine"]["torch"] = "another"
    output.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="2"):
        run("--series", "images")
    assert "keeps the other series of machine.json, but their torch is 'another'" in (
        capsys.readouterr().err
    )
    assert json.loads(output.read_text()) == found
    before, measure = output.read_text(), growth.measure

    def interrupted(series, rounds):
        if series.title == "too steep":
            raise KeyboardInterrupt
        return measure(series, rounds)

    monkeypatch.setattr(growth, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert output.read_text() == before
    partial = output.with_name("machine.json.partial")
    assert {*json.loads(partial.read_text())["series"]} == {"images"}
    monkeypatch.setattr(growth, "measure", measure)
    assert {*run()["series"]} == {"images", "steep"}
    assert not partial.exists()


def test_exponents_say_when_a_series_was_measured_and_beside_what(monkeypatch):
    series = stand_ins(monkeypatch)
    rows = [row("ours", 1e-3 * b + 1e-2) for b in (1, 2, 4, 8)]
    cases_of = [
        {"op": MIXUP, "name": case.name, "shape": dict(case.shape), "idle": True, "peers": [each]}
        for case, each in zip(series.cases, rows, strict=True)
    ]
    about = {"date": "2026-01-02", "commit": "abc", "fits": growth.fits(series, cases_of)}
    made = {"cases": cases_of, "series": {"images": about}}
    line = growth.exponents(made).splitlines()[2]
    assert line.endswith("| above B = 8 | 2026-01-02, abc; nothing else running |")
    cases_of[1] |= {"idle": False, "busy_cores": 0.5}
    cases_of[2] |= {"idle": False, "busy_cores": 1.25}
    text = "other programs kept up to 1.2 cores busy in 2 of 4 cases |"
    assert growth.exponents(made).splitlines()[2].endswith(text)
    assert len({each.count("|") for each in growth.exponents(made).splitlines()}) == 1


def test_a_bend_outside_of_the_sizes_is_named_by_its_side():
    sizes = [10_000, 20_000]
    assert growth.bends_at("C", 2500.0, sizes) == "below C = 10,000"
    assert growth.bends_at("C", 25_000.0, sizes) == "above C = 20,000"
    assert growth.bends_at("C", 12_345.0, sizes) == "C ≈ 12,000"
    assert growth.bends_at("C", None, sizes) == ""


def test_the_committed_growth_is_of_every_series():
    assert {name for names in growth.PANELS.values() for name in names} == {*growth.SERIES}
    assert growth.results()
    for found in growth.results().values():
        for name, series in growth.SERIES.items():
            of_series = growth.cases_of(series, found)
            assert [case["name"] for case in of_series] == [case.name for case in series.cases]
            fits = json.loads(json.dumps(growth.fits(series, of_series)))
            for peer, fit in found["series"][name]["fits"].items():
                assert fit["exponent"] == pytest.approx(fits[peer]["exponent"])
                assert fit["interval"] == pytest.approx(fits[peer]["interval"])


# ---- the roofline and the pictures ---------------------------------------------------------------


def whole():
    """Return results of every op's headlines, made up."""
    found = []
    for op in CASES:
        for number, case in enumerate(cases("cpu", op)[: HEADLINES[op]]):
            seconds = max(case.flops / 1.5e11, case.bytes / 1.5e10)
            rows = [row("ours", seconds), row("ours, neighbors", seconds / 2)]
            found.append(measured(op, number, *rows))
    return result("P", *found)


def test_every_op_is_on_the_roofline():
    found = roofline.points(whole())
    by_label = {point.label: point for point in found}
    assert {*by_label} == {
        "margin softmax", "repulsion, row-max", "repulsion, log-sum-exp", "neighbors", "mixup",
        "row update, sgd", "row update, adamw", "class sampling",
    }  # fmt: skip
    margin = by_label["margin softmax"]
    case = cases("cpu", MARGIN)[0]
    assert margin.intensity == case.flops / case.bytes
    assert margin.rate == pytest.approx(1.5e11)
    assert margin.roof == 0.2e12
    mixup = next(point for point in found if point.label == "mixup")
    assert mixup.roof == pytest.approx(mixup.intensity * 20e9)
    assert mixup.rate / mixup.roof == pytest.approx(15 / 20)
    neighbors, repulsion = by_label["neighbors"], by_label["repulsion, row-max"]
    assert neighbors.intensity == pytest.approx(2 * repulsion.intensity)
    assert not by_label["class sampling"].counted
    lines = roofline.one_machine(whole()).splitlines()
    assert len(lines) == 2 + len(found)
    assert re.search(r"\| class sampling \| .* \| – \| – \| 75% \|", lines[-1])
    without = whole()
    unmeasured = {"op": MARGIN, "name": case.name, "peers": [], "not_measured": "no time was left"}
    without["cases"][0] = unmeasured
    assert len(roofline.points(without)) == len(found) - 1
    del without["ceilings"]["copy_gigabyte_per_second"]
    assert roofline.points(without) == []


def check(figure):
    assert unlabeled(figure) == []
    assert legends_on_data(figure) == []
    assert overlapping_texts(figure) == []


def test_pictures_of_the_committed_results_are_drawn_again(tmp_path):
    with drawn() as figures:
        paths = pictures.draw_all(tmp_path)
    assert len(figures) == len(paths) >= 1
    for figure, path in zip(figures, paths, strict=True):
        check(figure)
        assert (table.PAGE.parent / path.name).exists()
    panels = figures[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == [*growth.PANELS]
    for axes in panels:
        assert "exponent" in axes.get_legend().get_texts()[0].get_text()
        assert axes.get_xscale() == axes.get_yscale() == "log"


def test_the_headline_shows_each_bar_with_its_number(tmp_path):
    some = whole()
    margin = next(case for case in some["cases"] if case["op"] == MARGIN)
    margin["peers"] = [
        row("ours", 2.0, peak=4096),
        row("three products", 1.5, 0.75),
        row("eager torch", 8.0, 4.0, peak=1 << 30),
    ]
    with drawn() as figures:
        pictures.draw_headline(some, tmp_path / "a.png")
        pictures.draw_headline(result("P"), tmp_path / "b.png")
    for figure in figures:
        check(figure)
        assert len(figure.axes) == 2 * len(pictures.HEADLINE_OPS)
    seconds, memory = figures[0].axes[:2]
    assert [each.get_text() for each in seconds.texts] == [
        "2.00 s", "1.50 s, 0.75×", "8.00 s, 4.00×", "not measured",
    ]  # fmt: skip
    assert [each.get_text() for each in memory.texts] == [
        "0 MiB", "1 MiB", "1.0 GiB", "not measured",
    ]  # fmt: skip
    assert [bar.get_x() for bar in seconds.patches] == [0.0] * 4
    assert [bar.get_width() for bar in seconds.patches] == pytest.approx([2.0, 1.5, 8.0, 0.0])
    assert [bar.get_width() > 0 for bar in memory.patches] == [True, True, True, False]
    for axes in figures[1].axes:
        assert {each.get_text() for each in axes.texts} == {"not measured"}


def test_a_panel_is_drawn_without_its_floor(tmp_path):
    found = json.loads(json.dumps(next(iter(growth.results().values()))))
    for each in found["cases"]:
        each["peers"] = [row for row in each["peers"] if row["peer"] == "ours"]
    with drawn() as figures:
        pictures.draw_growth(found, tmp_path / "a.png")
    check(figures[0])
    assert all(len(axes.get_xticks()) > 1 for axes in figures[0].axes)


def test_pictures_of_what_was_and_what_was_not_measured(tmp_path):
    nothing = next(iter(growth.results().values())) | {"cases": []}
    with drawn() as figures:
        pictures.draw_roofline(whole(), tmp_path / "a.png")
        pictures.draw_growth(nothing, tmp_path / "b.png")
    check(figures[0])
    assert len(figures[0].legends[0].get_texts()) == 8
    for axes in figures[1].axes:
        assert [text.get_text() for text in axes.texts] == ["not measured"]
