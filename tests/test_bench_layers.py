"""The layer bench: it refuses wrong results, writes what it reads, and its table says when a mark is missed."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import bench_layers
import layer_marks
import layer_peers
import timing

MACHINE = {"cpu": "c", "cores": "2", "threads": "1", "isa": "avx2", "torch": "2"}


def case(layer, batch, density, ratio, block="1x1", shape="s"):
    return {
        **{"layer": layer, "shape": shape, "batch": batch, "density": density, "block": block, "dense_us": 1.0},
        **{"kept": density, "roof": density / 2, "why": {}, "ratio": {n: [v, v, v] for n, v in ratio.items()}},
    }


def content(**sections):
    sections = {n.replace("_", "-"): {"machine": MACHINE, "sources": "", "cases": c} for n, c in sections.items()}
    return {"fma_peak_gflops": 100.0, "sections": sections}


def test_means_and_marks():
    told = content(
        linear=[case("linear", 32, 0.5, {"ours": 0.4}), case("linear", 256, 0.5, {"ours": 0.8})],
        conv=[case("conv", 16, 0.5, {"ours": 0.66})],
        blocks=[case("linear", 16, 0.1, {"ours": 0.12}, "16x1")],
    )
    assert layer_marks.means(told)["Linear, batch >= 32"] == {0.5: pytest.approx(math.sqrt(0.4 * 0.8), abs=1e-4)}
    rows = layer_marks.marks_table(told)
    assert rows[3] == "| 0.5 | 0.57 / 0.60 | - | 0.66* / 0.65 | - |"
    assert rows[6] == "| 0.1 | - | - | - | 0.12 / 0.12 |"


@pytest.mark.parametrize(
    "layer, shape, size",
    [("conv", "3-5 3x3 8x8 /2", (9, 5, 4, 4)), ("conv", "3-5 3x3 8x8", (9, 5, 8, 8)), ("linear", "4x6", (9, 6))],
)
def test_problems_check_their_layers(layer, shape, size):
    problem = bench_layers.Problem({"layer": layer, "shape": shape, "batch": 9, "density": 0.5, "block": "1x1"})
    y, dx = problem.ours()()
    assert (y.shape, dx.shape) == (size, problem.x.shape)
    wrong = layer_peers.through_autograd(problem.plain(problem.weight), problem.x, problem.dy)  # nothing is pruned
    with pytest.raises(AssertionError):
        problem.checked(wrong)


def test_report_names_what_is_slower_and_the_better_way_of_a_peer():
    peers = {"ours": 0.3, "torch CSR, sampled_addmm": 1.4, "torch CSR, dense dw": 1.2}
    told = content(
        peers=[case("linear", 64, 0.2, peers)],
        never_slower=[case("linear", 1, d, {"ours": r, "dense": 0.98}) for d, r in [(0.5, 1.06), (0.1, 1.04)]],
        threads=[{**case("conv", 16, 0.2, {}), "speed_up": {"ours": [1, 1.9, 2], "dense": [1, 1.8, 2]}}],
    )
    lines = layer_marks.report(told)
    assert "| torch CSR | - | - | - | 1.20 | - | - | - |" in lines
    assert "| ideal | - | - | - | 0.20 | - | - | - |" in lines
    assert any(line.startswith("1 of 2 cases above 1.05x dense") and "2.0%" in line for line in lines)
    assert "  linear s batch 1 density 0.5: 1.06 (1.06 to 1.06) of 1 us" in lines
    assert "| conv s batch 16 | 0.2 | 1.90 | 1.80 |" in lines
    assert json.loads(layer_marks.dumps(told)) == told
    assert layer_marks.report({"sections": {}}) == ["nothing is measured yet"]


def test_the_cases_are_those_of_the_marks():
    assert len(layer_marks.DENSITIES) == len(layer_marks.MARKS["Conv2d"]) == 7
    columns = [layer_marks.column(c) for s in ("linear", "conv", "blocks") for c in bench_layers.cases(s)]
    # 5 shapes at 3 batches and at one; 3 convolutions at 2 batches; 5 shapes, 4 batches, 2 blocks; 7 densities
    assert {c: columns.count(c) for c in columns} == dict(zip(layer_marks.MARKS, (105, 35, 42, 280), strict=True))
    for section in bench_layers.SECTIONS:
        keys = [bench_layers.key(c) for c in bench_layers.cases(section)]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("layer, shape", [("linear", "33x18"), ("conv", "3-5 3x3 7x7")])
def test_every_way_that_runs_here_gives_the_right_result(layer, shape):
    asked = {"layer": layer, "shape": shape, "batch": 16, "density": 0.5, "block": "1x1"}
    row = bench_layers.measure("peers", asked, peak=100.0)
    table = layer_peers.CONV if layer == "conv" else layer_peers.LINEAR
    assert {"ours", "weight*mask", "torch prune"} <= set(row["ratio"])
    assert set(row["ratio"]) | set(row["why"]) == {"ours", *table}
    assert all(name in ("sparseprop", "sparselab", "scipy") or "MKL" in why for name, why in row["why"].items())


def test_a_wrong_result_is_not_timed():
    problem = bench_layers.Problem({"layer": "linear", "shape": "9x8", "batch": 4, "density": 0.5, "block": "4x1"})
    assert torch.equal(problem.mask[:4], problem.mask[:1].expand(4, 9))

    def wrong(*arguments):
        step = layer_peers.masked_product(*arguments)
        return lambda: tuple(t * 1.01 for t in step())

    problem.peer(layer_peers.masked_product)
    with pytest.raises(AssertionError, match="not close"):
        problem.peer(wrong)


def test_pairs_are_taken_in_turns():
    told = []
    ways = {"a": lambda: told.append("a"), "b": lambda: told.append("b")}
    found, seconds = timing.interleaved(lambda: told.append("-"), ways, pairs=2, seconds=0)
    assert "".join(told[-8:]) == "-a-b-b-a"
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert seconds > 0


def test_two_threads_are_timed_beside_one(monkeypatch):
    asked = {"layer": "linear", "shape": "33x18", "batch": 16, "density": 0.5, "block": "1x1"}
    monkeypatch.setattr(bench_layers.os, "sched_getaffinity", lambda _: {0, 1})
    row = bench_layers.measure("threads", asked, peak=None)
    assert set(row["speed_up"]) == {"ours", "dense"}
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(bench_layers.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(SystemExit, match="two cores"):
        bench_layers.measure("threads", asked, peak=None)
