"""The GPU benchmark runs whole at reduced size, so that it needs no repair on a borrowed device."""

import json
import sys

import pytest

sys.path.insert(0, "benchmarks")
device_speed = pytest.importorskip("device_speed")

pytestmark = pytest.mark.slow


def run(monkeypatch, out, *more):
    """Run the script at reduced size."""
    line = ["device_speed.py", "--small", "--rounds", "1", "--steps", "2", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", line)
    device_speed.main()


def test_every_small_case_runs_and_each_is_written_when_it_is_done(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["device_speed.py", "--small", "--rounds", "1", "--steps", "2", "--out", str(out)]
    )
    device_speed.main()
    printed = capsys.readouterr().out
    assert "failed" not in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    *cases, files = records
    assert [record["case"] for record in cases] == [case.title for case in device_speed.SMALL_CASES]
    assert device_speed.table(files) in printed
    assert all(value > 0 for value in files["images per second"].values()) and len(files["images per second"]) == 6
    for record in cases:
        rows = record["rows"]
        assert rows["plain"]["ratio"] > 0 and rows["plain"]["arithmetic"] == 1.0
        assert rows["stochastic depth"]["arithmetic"] < 1 and "mean of feature reuse" in rows
        assert device_speed.table(record) in printed
    assert all("masked freeze per sample" in record["rows"] for record in cases[:3])


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speed.jsonl"
    real = device_speed.measure

    def measure(case, *more):
        if case.compiled:
            raise RuntimeError("no compiler")
        return real(case, *more)

    monkeypatch.setattr(device_speed, "measure", measure)
    monkeypatch.setattr(device_speed, "SMALL_CASES", (device_speed.SMALL_CASES[1], device_speed.SMALL_CASES[3]))
    monkeypatch.setattr(
        sys, "argv", ["device_speed.py", "--small", "--rounds", "1", "--steps", "1", "--out", str(out)]
    )
    device_speed.main()
    assert "compiled blocks failed: RuntimeError: no compiler" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 2


def test_no_case_starts_after_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["device_speed.py", "--small", "--budget", "-1", "--out", str(tmp_path / "o.jsonl")]
    )
    device_speed.main()
    assert capsys.readouterr().out.count("No time left") == len(device_speed.SMALL_CASES) + 1


def test_page_and_readme_show_what_was_measured():
    records = device_speed.published()
    page = device_speed.page(records)
    assert page in device_speed.PAGE.read_text(encoding="utf-8")
    readme = (device_speed.ROOT / "README.md").read_text(encoding="utf-8")
    names = {"mean of the default cycle": "mean of feature reuse"}
    shown = ("stochastic depth", "masked freeze", "mean of the default cycle", "drop path of transformers")
    for name in shown:
        line = next(line for line in page.splitlines() if line.startswith(f"| {names.get(name, name)} |"))
        cells = line.split(" | ")[1:5]
        assert f"| {name} | {' | '.join(cells)} |" in readme


def test_only_the_cases_asked_for_run(tmp_path, monkeypatch):
    out = tmp_path / "speed.jsonl"
    run(monkeypatch, out, "--only", "ResNet-50")
    [record] = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["case"].startswith("ResNet-50")
