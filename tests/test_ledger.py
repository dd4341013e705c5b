"""The ledger: sums, splits, cost to target and ratios, recomputed by hand from the JSON lines alone."""

import json

import pytest

from autoflip.fed.ledger import ClientRecord, Record, read_records, summarise


def _record(method, number, accuracy, flops, up, down, seconds, phase="training"):
    client = ClientRecord(0, up, down, seconds, flops, 10, 0.1, None)
    cost = (flops, up, down, seconds, seconds, 0.0, 0.1)
    return Record(method, 0, number, phase, accuracy, 1.0, *cost, 0.5, 0.5, {"w": 0.5}, (client,))


@pytest.fixture
def records():
    ours = [_record("autoflip", 0, 0.1, 50, 7, 3, 0.5, "exploration")]
    ours += [_record("autoflip", r, 0.2 * r, 10, 1, 2, 0.25) for r in range(1, 5)]
    theirs = [_record("fedavg", r, 0.15 * r, 100, 40, 40, 1.0) for r in range(5)]
    return [r for pair in zip(ours, theirs) for r in pair]


def test_summary_equals_an_independent_reading_of_the_lines(records):
    lines = [json.loads(json.dumps(r.as_dict())) for r in records]
    summary = summarise(records, "autoflip", "fedavg", {"dataset": "x"})
    mine = [line for line in lines if line["method"] == "autoflip"]
    theirs = [line for line in lines if line["method"] == "fedavg"]
    assert summary["target_accuracy"] == theirs[-1]["accuracy"] == 0.6
    for value in ("flops", "bytes_up", "bytes_down", "seconds"):
        assert summary["method"][value]["exploration"] == mine[0][value]
        assert summary["method"][value]["total"] == sum(line[value] for line in mine)
        want = sum(line[value] for line in mine) / sum(line[value] for line in theirs)
        assert summary["ratios"][value] == pytest.approx(want)
    reached = next(i for i, line in enumerate(mine) if line["accuracy"] >= 0.6)
    assert summary["method"]["to_target"] == {
        "accuracy": mine[reached]["accuracy"],
        "flops": sum(line["flops"] for line in mine[: reached + 1]),
        "bytes": sum(line["bytes_up"] + line["bytes_down"] for line in mine[: reached + 1]),
        "seconds": sum(line["seconds"] for line in mine[: reached + 1]),
        "round": 3,
    }
    assert summary["ratios"]["to_target"]["flops"] == pytest.approx((50 + 30) / 500)


def test_a_target_never_reached_says_so(records):
    low = [r for r in records if r.method == "fedavg" or r.round < 2]
    summary = summarise(low, "autoflip", "fedavg", {})
    assert summary["method"]["to_target"] is None
    assert summary["ratios"]["to_target"] is None


def test_alone_there_is_nothing_to_compare_with(records):
    summary = summarise(records, "autoflip", None, {})
    assert summary["against"] is None
    assert summary["ratios"] is None
    assert summary["target_accuracy"] == 0.8


def test_records_survive_the_file_and_damage_is_named(records, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r.as_dict()) + "\n" for r in records))
    assert read_records(path) == records
    path.write_text(path.read_text() + '{"method": "autoflip"\n')
    with pytest.raises(ValueError, match="line 11: not a round record"):
        read_records(path)
