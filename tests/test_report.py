"""The report: every figure on the page follows from records.jsonl, nothing is fetched, nothing is injected."""

import html.parser
import json
import re

import pytest
from fake_run import records, write_run

from autoflip import report
from autoflip.report import runs, units


class Reader(html.parser.HTMLParser):
    """Collects every data-key / data-value of a page, and whether its tags close."""

    VOID = ("meta", "br", "rect", "line", "circle", "polyline", "polygon")

    def __init__(self, text):
        super().__init__()
        self.values, self.open, self.tags, self.text = {}, [], [], []
        self.feed(text)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if "data-value" in attrs:
            self.values.setdefault(attrs["data-key"], set()).add(float(attrs["data-value"]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def recount(folder):
    """Every figure of the table from records.jsonl alone, by a reader that shares no code with the report."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(line["method"] for line in lines))
    target = [line for line in lines if line["method"] == names[1]][-1]["accuracy"]
    out = {}
    for role, name in zip(("method", "against"), names, strict=True):
        mine = [line for line in lines if line["method"] == name]
        out[f"{role}.final_accuracy"] = mine[-1]["accuracy"]
        out[f"{role}.best_accuracy"] = max(line["accuracy"] for line in mine)
        out[f"{role}.density"] = mine[-1]["density"]
        for key in ("flops", "bytes_up", "bytes_down", "seconds"):
            out[f"{role}.{key}.total"] = sum(line[key] for line in mine)
            out[f"{role}.{key}.exploration"] = sum(line[key] for line in mine if line["phase"] == "exploration")
        out[f"{role}.bytes.total"] = out[f"{role}.bytes_up.total"] + out[f"{role}.bytes_down.total"]
        spent = dict.fromkeys(("flops", "bytes", "seconds"), 0.0)
        for line in mine:
            spent["flops"] += line["flops"]
            spent["bytes"] += line["bytes_up"] + line["bytes_down"]
            spent["seconds"] += line["seconds"]
            if line["accuracy"] >= target:
                out.update({f"{role}.to_target.{key}": value for key, value in spent.items()})
                out[f"{role}.to_target.round"] = line["round"]
                break
    for key in ("flops", "bytes_up", "bytes_down", "bytes", "seconds"):
        out[f"ratios.{key}"] = out[f"method.{key}.total"] / out[f"against.{key}.total"]
    for key in ("flops", "bytes", "seconds"):
        if f"method.to_target.{key}" in out:
            out[f"ratios.to_target.{key}"] = out[f"method.to_target.{key}"] / out[f"against.to_target.{key}"]
    return out


def check_page(folder):
    """The page's figures and the recount are the same set of names with the same values."""
    page = Reader((folder / "report.html").read_text(encoding="utf-8"))
    want = recount(folder)
    assert page.values.keys() == want.keys()
    for key, value in want.items():
        # sums of seconds may be added in another order
        assert sorted(page.values[key]) == [pytest.approx(value, rel=1e-12)], key
    return page


def test_every_figure_follows_from_the_records(tmp_path):
    folder = write_run(tmp_path / "run")
    assert report.write(folder) == folder / "report.html"
    page = check_page(folder)
    assert {"ratios.to_target.bytes", "ratios.to_target.seconds"} <= page.values.keys()


def test_marks_stand_at_the_round_of_the_table(tmp_path):
    folder = write_run(tmp_path / "run")
    text, want = report.write(folder).read_text(encoding="utf-8"), recount(folder)
    marks = re.findall(r"first at the target\. (.*?), round (\d+)", text)
    rounds = {"autoflip": want["method.to_target.round"], "dense FedAvg": want["against.to_target.round"]}
    assert len(marks) == 8  # two methods on four plots
    assert {(name, int(at)) for name, at in marks} == set(rounds.items())


def test_the_target_itself_counts_as_reached():
    curve = runs.curve_of("m", [{**line, "accuracy": 0.5 + line["round"] / 8} for line in records("m", rounds=4)])
    assert runs.cost_to(curve, 0.75)["round"] == 2
    assert runs.cost_to(curve, 0.8)["round"] == 3
    assert runs.cost_to(curve, 0.9) is None


def test_page_fetches_nothing_and_runs_nothing(tmp_path):
    text = report.write(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Reader(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "image", "object", "base"}
    assert not re.search(r"https?://|url\(|@import|\bon\w+=", text)
    assert "default-src 'none'" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 6  # four curves, bytes of two methods


def test_names_from_users_are_escaped(tmp_path):
    evil = "</title><script>alert(1)</script>"
    folder = write_run(tmp_path / "run", dataset=evil)
    (folder / "config.toml").write_text(f'[data]\nname = "{evil}"\n')
    text = (folder / "records.jsonl").read_text().replace("fc1.weight", "<b onclick=x>")
    (folder / "records.jsonl").write_text(text)
    page = Reader(report.write(folder).read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onclick" not in attrs for _, attrs in page.tags)
    assert evil in "".join(page.text)


def test_rejected_clients_are_named(tmp_path):
    page = Reader(report.write(write_run(tmp_path / "run")).read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "Rejected updates (2)" in text
    assert "update <rejected>: 3 values of 'fc1.weight' are NaN" in text


def test_target_never_reached_is_said(tmp_path):
    folder = write_run(tmp_path / "run", "fedavg", "autoflip", rounds=12)  # the dense one learns more slowly
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"]["to_target"] is None
    assert "did not reach the final accuracy" in report.headline(summary)
    report.write(folder)
    page = check_page(folder)
    assert "over all rounds" in "".join(page.text)


def test_run_without_a_rival(tmp_path):
    folder = write_run(tmp_path / "run", "autoflip")
    summary = json.loads((folder / "summary.json").read_text())
    assert report.headline(summary).startswith("autoflip reached ")
    Reader(report.write(folder).read_text(encoding="utf-8"))
    assert len(report.summary_table(summary).columns) == 2


def test_rival_that_spent_nothing(tmp_path):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["ratios"]["to_target"]["seconds"] = None  # fed divides by nothing
    (folder / "summary.json").write_text(json.dumps(summary))
    report.write(folder)
    assert "seconds." not in report.headline(summary)
    assert "fewer FLOPs and" in report.headline(summary)


def test_one_round(tmp_path):
    folder = write_run(tmp_path / "run", rounds=1)
    report.write(folder)
    check_page(folder)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda folder: (folder / "summary.json").unlink(), "autoflip resume"),
        (lambda folder: (folder / "records.jsonl").unlink(), "no records.jsonl"),
        (lambda folder: (folder / "records.jsonl").write_text('{"method": "autoflip", "rou'), "line 1 is not JSON"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "wanted a JSON object"),
        (lambda folder: (folder / "summary.json").write_text('{"version": 9}'), "version 9"),
        (lambda folder: (folder / "summary.json").write_text('{"version": 1}'), "lacks something"),
        (lambda folder: (folder / "records.jsonl").write_text('{"method": "autoflip"}\n'), "no line of it"),
    ],
    ids=["no summary", "no records", "cut record", "list", "version", "empty summary", "one method"],
)
def test_damaged_folder_is_one_clear_error(tmp_path, break_it, words):
    folder = write_run(tmp_path / "run")
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        report.write(folder)


def test_terminal_table_says_the_same(tmp_path):
    from rich.console import Console

    folder = write_run(tmp_path / "run")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.summary_table(json.loads((folder / "summary.json").read_text())))
    text, want = console.export_text(), recount(folder)
    for words in (
        units.bytes_text(want["method.bytes.total"]),
        units.flops_text(want["against.flops.total"]),
        units.ratio_text(want["ratios.to_target.bytes"]),
        units.seconds_text(want["method.seconds.total"]),
    ):
        assert words in text


def test_compare_means_and_errors(tmp_path):
    entries = []
    for method in ("autoflip", "fedavg"):
        for seed in range(3):
            write_run(tmp_path / f"{method}-{seed}", method, seed=seed)
            entries.append((method, seed, f"{method}-{seed}"))
    content = report.collect(tmp_path, entries)
    (tmp_path / "compare.json").write_text(json.dumps(content))
    page = Reader(report.compare_report(tmp_path).read_text(encoding="utf-8"))

    finals, spent = [], []
    for seed in range(3):
        files = [tmp_path / f"{method}-{seed}" / "records.jsonl" for method in ("autoflip", "fedavg")]
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        finals.append(lines[0][-1]["accuracy"])
        target, total = lines[1][-1]["accuracy"], 0
        for line in lines[0]:
            total += line["bytes_up"] + line["bytes_down"]
            if line["accuracy"] >= target:
                spent.append(total)
                break
    assert sorted(page.values["autoflip.final_accuracy"]) == [pytest.approx(sum(finals) / 3)]
    assert sorted(page.values["autoflip.to_target.bytes"]) == [pytest.approx(sum(spent) / len(spent))]
    mean = sum(finals) / 3
    error = (sum((x - mean) ** 2 for x in finals) / 2 / 3) ** 0.5
    assert content["methods"]["autoflip"]["final_accuracy"]["stderr"] == pytest.approx(error)
    assert len(report.compare_table(content).rows) == 2


def test_compare_names_rounds_and_gives_every_method_a_colour(tmp_path):
    entries = []
    for i in range(10):
        write_run(tmp_path / f"run-{i}", f"m{i}")
        file = tmp_path / f"run-{i}" / "records.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line["round"] = 2 * line["round"] + 1  # as with fed.eval_every=2
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        entries.append((f"m{i}", 0, f"run-{i}"))
    (tmp_path / "compare.json").write_text(json.dumps(report.collect(tmp_path, entries)))
    text = report.compare_report(tmp_path).read_text(encoding="utf-8")
    assert "round 1:" in text
    assert "round 0:" not in text
    assert {f's{i}"' in text or f"s{i} " in text for i in range(10)} == {True}


def test_compare_without_its_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="autoflip compare writes it"):
        report.compare_report(tmp_path)


@pytest.mark.parametrize(
    "got, want",
    [
        (units.flops_text(999_960_000), "1.00 GFLOP"),
        (units.flops_text(0), "0 FLOP"),
        (units.bytes_text(1_500_000), "1.50 MB"),
        (units.bytes_text(999), "999 B"),
        (units.seconds_text(0.085), "85.0 ms"),
        (units.seconds_text(245), "4 min 05 s"),
        (units.seconds_text(7_380), "2 h 03 min"),
        (units.percent_text(0.931), "93.1 %"),
        (units.percent_text(0.0012), "0.120 %"),
        (units.ratio_text(0.31), "3.23x less"),
        (units.ratio_text(1.5), "1.5x more"),
        (units.ratio_text(0.001), "1,000x less"),
        (units.ratio_text(1.0), "the same"),
        (units.error_text("flops", 4.75e9, 5_400.0), "4.75 ± <0.01 GFLOP"),
        (units.error_text("share", 0.926, 0.004), "92.6 ± 0.4 %"),
    ],
)
def test_numbers_read_well(got, want):
    assert got == want
