"""The methods' bench: which result files stand, what seconds are compared by, and the variant that no option makes."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from autoflip import fed
from autoflip.fed import downlink

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "experiments"))
import marks
import table
from rows import CLASSES, LONGER, ROWS
from variants import PATCHES, VARIANTS

SMALL = ["fed.against=none", "fed.clients=3", "fed.fraction=1.0", "fed.rounds=6", "train.epochs=1"]
SMALL += ["explore.fraction=1.0", "data.samples_per_client=32"]


def test_a_file_that_is_older_than_a_key_stands_where_the_key_has_its_default():
    config = fed.Config.load(overrides=["prune.inputs=1.0", "data.root=somewhere"])
    stored = table.told(config)
    assert table.same(stored, config)
    del stored["prune"]["inputs"]
    assert table.same(stored, config)
    assert not table.same(stored, fed.Config.load(overrides=["prune.inputs=0.5"]))
    assert not table.same({**stored, "prune": {"gone": 1}}, config)
    other = {**stored, "explore": {**stored["explore"], "agreement": 0.5}}
    assert not table.same(other, config)
    dense = fed.Config.load(overrides=["fed.method=fedavg", "fed.against=none", "data.root=somewhere"])
    assert table.same({**other, "fed": {**other["fed"], "method": "fedavg", "against": "none"}}, dense)


def test_seconds_are_the_clients_only_where_all_files_tell_them_apart():
    def runs(seconds, clients=None):
        costs = {"flops": [1, 2], "bytes": [1, 2], "seconds": [1.0, seconds], "round": [2, 4]}
        extra = {} if clients is None else {"client_seconds": [0.5, clients]}
        return {0: {"curve": {"accuracy": [0.1, 0.9], **costs, **extra}}}

    assert table.against(runs(8.0, 1.0), runs(10.0, 5.0))["whole"]["seconds"] == pytest.approx(0.2)
    old = table.against(runs(8.0, 1.0), runs(10.0))
    assert old["to_target"]["seconds"] == pytest.approx(0.8)
    assert not old["clients_alone"]


def test_seconds_of_different_instruction_sets_are_not_compared(tmp_path):
    def write(method, isa):
        content = {**_result("row", method, 0, 0.5, 10.0), "tag": "", **({"isa": isa} if isa else {})}
        (tmp_path / f"method-row-{method}-seed0.json").write_text(json.dumps(content))

    for ours, theirs, comparable in (("AVX2", "AVX2", True), ("AVX2", None, False), ("AVX512", None, True)):
        write("autoflip", ours)
        write("fedavg", theirs)
        entry = marks.entries(tmp_path)["row"]
        for cost in ("to_target", "whole"):
            assert (entry[cost]["seconds"] is not None) == comparable
            assert entry[cost]["flops"] == 1
        line = next(one for one in table.table(tmp_path).split("\n") if "| autoflip |" in one)
        assert line.split(" | ")[-1] == ("1.00x |" if comparable else "– |")
    runs = [{n: _result("row", "m", n, 0.5, cost) for n in (0, 1)} for cost in (10.0, 20.0)]
    runs[0][1]["isa"] = "AVX2"
    runs[0][1]["curve"]["client_seconds"] = [500.0, 1000.0]
    assert table.against(*runs)["to_target"]["seconds"] == table.against(*runs)["whole"]["seconds"] == 0.5


def _result(row, method, seed, accuracy, cost):
    spent = {key: [cost / 2, cost] for key in ("flops", "seconds", "client_seconds")}
    spent["bytes"] = [cost / 200, cost / 100] if method == "autoflip" else [0.5, 1.0]
    curve = {"round": [1, 2], "accuracy": [0.1, accuracy], **spent}
    return {"row": row, "method": method, "tag": "", "seed": seed, "curve": curve}


def test_marks_take_the_median_over_rows_and_name_those_that_miss_one(tmp_path):
    finals = {"cheap": (0.5, 4.0), "dear": (0.5, 40.0), "never": (0.4, 2.0), "digits-easy": (0.1, 90.0)}
    for row, (accuracy, cost) in finals.items():
        for seed in range(2):
            pieces = {"fedavg": (0.5, 100.0), "autoflip": (accuracy, cost)}
            for method, (reached, spent) in pieces.items():
                content = _result(row, method, seed, reached + 0.01 * seed, spent)
                (tmp_path / f"method-{row}-{method}-seed{seed}.json").write_text(json.dumps(content))
    rows = marks.entries(tmp_path)
    assert set(rows) == {"cheap", "dear", "never"}
    assert marks.missed(rows) == ["dear", "never"]
    text = marks.summary(tmp_path)
    # 0.1, 0.4 and never: the row that did not get there is the dearest
    assert "| FLOPs | 0.400x | 0.100x | never | 0.250x | 2 |" in text
    assert "2 of 3 rows" in text
    assert text.endswith("not: never.")
    curves = marks.reachable(tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in curves[2:]] == ["| dear", "| never"]
    # half of the dear run lies within 0.2 of dense's FLOPs, at accuracy 0.1 against 0.50 and 0.51
    assert curves[2].split(" | ")[4:] == ["-40.5 ± 0.5", "+0.0 ± 0.0 |"]


def test_longer_rows_stand_for_the_short_ones_once_each_has_its_seeds(tmp_path):
    def write(row, cost, seeds):
        near = 2 / CLASSES.get(row.split("-")[0], 10)  # twice chance
        for seed in range(seeds):
            for method, spent in (("fedavg", 100.0), ("autoflip", cost)):
                content = _result(row, method, seed, near if row in LONGER else 0.5, spent)
                (tmp_path / f"method-{row}-{method}-seed{seed}.json").write_text(json.dumps(content))

    write("easy", 10.0, 2)
    for row, name in LONGER.items():
        write(row, 60.0, 2)
        write(name, 20.0, marks.SEEDS)
    (tmp_path / f"method-{name}-fedavg-seed0.json").unlink()
    rows = marks.entries(tmp_path)
    assert set(marks.longer(rows)) == set(marks.short(rows)) == {"easy", *LONGER}
    assert "twice the rounds" not in marks.summary(tmp_path)
    write(name, 20.0, marks.SEEDS)
    assert set(marks.longer(marks.entries(tmp_path))) == {"easy", *LONGER.values()}
    before, after = marks.summary(tmp_path).split("twice the rounds")
    assert "| FLOPs | 0.600x | 0.100x | 0.600x | 0.250x | 4 |" in before
    assert "| FLOPs | 0.200x | 0.100x | 0.200x | 0.250x | 0 |" in after


def _two_runs(accuracy, channels=0.0):
    curve = {"flops": [1, 2], "bytes": [1, 2]}
    config = {"prune": {"channels": channels}}
    return {n: {"config": config, "curve": {"accuracy": [0.1, accuracy + 0.01 * n], **curve}} for n in (0, 1)}


def test_a_variant_of_a_variant_is_compared_with_that_variant():
    found = {("row", f"autoflip{tag}"): _two_runs(a) for tag, a in (("", 0.5), ("+a", 0.4), ("+a+b", 0.7))}
    assert table.paired(found, "autoflip+a")["final"] == pytest.approx((-0.1, 0.0))
    assert table.paired(found, "autoflip+a+b")["final"] == pytest.approx((0.3, 0.0))


def test_a_variant_with_the_channels_of_the_wider_model_is_compared_with_that_model():
    found = {("row", "autoflip"): _two_runs(0.5), ("row", f"autoflip+{table.WIDER}"): _two_runs(0.6, 0.4375)}
    found |= {("row", "autoflip+a"): _two_runs(0.4), ("row", "autoflip+b"): _two_runs(0.4, 0.4375)}
    found |= {("row", "autoflip+b+c"): _two_runs(0.7, 0.4375), ("row", "autoflip+d"): _two_runs(0.4, 0.25)}
    wanted = {table.WIDER: 0.1, "a": -0.1, "b": -0.2, "b+c": 0.3, "d": -0.1}
    assert {tag: table.paired(found, f"autoflip+{tag}")["final"][0] for tag in wanted} == pytest.approx(wanted)


def test_no_marks_without_results(tmp_path):
    assert not marks.summary(tmp_path)
    assert not marks.reachable(tmp_path)


def test_without_error_feedback_the_roundings_of_the_way_down_add_up():
    """Without a running mean the evaluated model is the server's; what clients hold drifts from it."""

    def drift(patch):
        seen = []
        with patch(), pytest.MonkeyPatch.context() as context:
            real = downlink.send

            def spy(params, masks, held, kind, locate, **keys):
                view, frames = real(params, masks, held, kind, locate, **keys)
                goal = locate(masks).shrink(params)
                seen.append(sum(float((v.float() - goal[n]).square().sum()) for n, v in view.params.items()))
                return view, frames

            context.setattr(downlink, "send", spy)
            fed.run(config)
        return seen[-1]

    config = fed.Config.load(overrides=SMALL)
    assert set(PATCHES) <= set(VARIANTS)
    # five broadcasts' errors instead of the last one's, steps shrinking in between
    assert drift(PATCHES["no error feedback"]) > 1.5 * drift(nullcontext)


def test_the_longer_rows_are_those_that_the_rule_names():
    found = marks.entries(Path(marks.__file__).parents[1] / "results")
    near = {row for row, entry in marks.short(found).items() if marks.near_chance(row, entry)}
    assert near
    assert near <= set(LONGER)  # more seeds may lift a row over the rule
    assert marks.longer(found).keys() == marks.short(found).keys() - near | {LONGER[row] for row in near}
    assert all(ROWS[name] == [*ROWS[row], "fed.rounds=80"] for row, name in LONGER.items())
