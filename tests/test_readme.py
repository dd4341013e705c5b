"""README's figures come out of the committed result files, and its examples run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autoflip

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "README.md differs from bench/results; run: python tools/readme.py"


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_means_are_those_of_the_runs(name):
    content = json.loads((ROOT / "bench" / "results" / f"round-{name}.json").read_text())
    mean, runs = content["mean"], [r["summary"] for r in content["runs"]]
    assert mean["seeds"] == len(runs) == len({r["seed"] for r in runs}) >= 3
    ours = [r["method"]["final_accuracy"] for r in runs]
    theirs = [r["against"]["final_accuracy"] for r in runs]
    gaps = torch.tensor([a - b for a, b in zip(ours, theirs)], dtype=torch.float64)
    assert mean["accuracy_difference"] == pytest.approx(float(gaps.mean()))
    assert mean["accuracy_difference_stderr"] == pytest.approx(float(gaps.std() / len(gaps) ** 0.5))
    flops = [r["method"]["flops"]["total"] / r["against"]["flops"]["total"] for r in runs]
    assert mean["ratios"]["flops"] == pytest.approx(sum(flops) / len(flops))


def test_the_five_line_example_runs():
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    delta = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    names = {"model": model, "delta": dict(delta)}
    exec(code, names)
    assert names["autoflip"] is autoflip
    kept = names["masks"]["0.weight"]
    assert names["delta"]["0.weight"][~kept].abs().sum() == 0
    # int8: a block's scale is its largest value over 127, rounded up or down at random
    gap = (names["delta"]["0.weight"] - delta["0.weight"])[kept].abs().max()
    assert float(gap) <= float(delta["0.weight"][kept].abs().max()) / 127 * 1.01
