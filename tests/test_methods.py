"""Every method through the same loop: what it evaluates, what it keeps, what its server does with the updates."""

import dataclasses
import json

from autoflip import fed, report
from autoflip.report.runs import curve_of

SMALL = ["fed.rounds=5", "fed.clients=4", "fed.fraction=0.5", "train.epochs=1", "data.samples_per_client=40"]


def _config(*overrides):
    return fed.Config.load(overrides=[*SMALL, *overrides])


def test_rounds_between_evaluations_cost_the_same_and_have_no_accuracy(tmp_path):
    every = fed.run(_config("fed.against=none"))
    some = fed.run(_config("fed.against=none", "fed.eval_every=3"), out=tmp_path / "run")
    assert [r.accuracy is None for r in some.records] == [True, True, False, True, False]  # after 3, and the last
    assert some.records[2].accuracy == every.records[2].accuracy
    assert some.accuracy == every.accuracy
    for a, b in zip(some.records, every.records):
        assert (a.flops, a.bytes_up, a.bytes_down) == (b.flops, b.bytes_up, b.bytes_down)
    assert some.summary["method"]["flops"] == every.summary["method"]["flops"]
    assert fed.resume(tmp_path / "run").summary == some.summary
    curve = curve_of("autoflip", [json.loads(json.dumps(r.as_dict())) for r in some.records])
    assert curve.rounds == [2, 4]
    assert curve.flops == [sum(r.flops for r in some.records[: n + 1]) for n in (2, 4)]
    assert report.write(tmp_path / "run").exists()


def test_the_target_is_looked_for_in_evaluated_rounds_only():
    from autoflip.fed.ledger import summarise

    ours = list(fed.run(_config("fed.against=none")).records)
    at = [0.1, 0.9, None, 0.5, 0.6]
    seen = [dataclasses.replace(r, accuracy=a) for r, a in zip(ours, at)]
    assert summarise(seen, "autoflip", None, {})["method"]["to_target"]["round"] == 1
    seen[1] = dataclasses.replace(seen[1], accuracy=None)
    assert summarise(seen, "autoflip", None, {})["method"]["to_target"]["round"] == 4
