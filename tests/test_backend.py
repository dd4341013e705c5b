"""AUTOFLIP_BACKEND and AUTOFLIP_CPU: what a wish decides, what it leaves alone, and that ``info`` always prints."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoflip import cli, curvature, ops
from autoflip.ops import backend

CPU = torch.device("cpu")


def diagonal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    return curvature.hessian_diagonal(model, F.cross_entropy, (torch.randn(5, 1, 4, 4), torch.arange(5) % 3))


@pytest.mark.parametrize("wish", ["", "auto", "cpp", "reference", "cuda", "triton"])
def test_curvature_runs_under_every_wish(wish, monkeypatch):
    monkeypatch.delenv("AUTOFLIP_BACKEND", raising=False)
    want = diagonal()
    monkeypatch.setenv("AUTOFLIP_BACKEND", wish)
    if wish == "cuda" and not torch.cuda.is_available():
        with pytest.raises(backend.BackendError, match="AUTOFLIP_BACKEND=cuda, which cannot run here"):
            diagonal()
        return
    got = diagonal()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(
    "wish, op, served",
    [
        ("", "masked_matmul", "auto"),
        ("cuda", "squared_matmul", "auto"),
        ("cpp", "conv_squares", "cpp"),
        ("cpp", "rademacher", "cpp"),
        ("cuda", "rademacher", "auto"),
        ("cuda", "delta", "auto"),
        ("reference", "rademacher", "reference"),
    ],
)
def test_a_wish_counts_where_there_is_such_a_kernel(wish, op, served, monkeypatch):
    monkeypatch.delenv("AUTOFLIP_BACKEND", raising=False)
    best = backend.serve(op, CPU)
    monkeypatch.setenv("AUTOFLIP_BACKEND", wish)
    nowhere = wish == "cuda" and not torch.cuda.is_available()
    if nowhere or (served == "cpp" and backend.unavailable("cpp", "cpu")):
        with pytest.raises(backend.BackendError, match="cannot run here"):
            backend.serve(op, CPU)
    else:
        assert backend.serve(op, CPU) == (best if served == "auto" else served)


def test_a_backend_that_can_run_nowhere_here_stops_every_op(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "extension", lambda name: (None, f"{name} is not built"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.unavailable.cache_clear()
    backend._serve.cache_clear()
    try:
        for wish, why in (("cuda", "_cuda is not built"), ("cpp", "_C is not built"), ("triton", "triton|CUDA")):
            monkeypatch.setenv("AUTOFLIP_BACKEND", wish)
            for op in ("masked_matmul", "squared_matmul", "rademacher", "delta"):
                with pytest.raises(backend.BackendError, match=f"={wish}, which cannot run here: .*({why})"):
                    backend.serve(op, CPU)
    finally:
        backend.unavailable.cache_clear()
        backend._serve.cache_clear()


def test_a_backend_that_does_not_exist_stops_every_op(monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", "bogus")
    for op in ("masked_matmul", "squared_matmul", "rademacher", "delta"):
        with pytest.raises(backend.BackendError, match="AUTOFLIP_BACKEND='bogus'; wanted auto or one of reference"):
            backend.serve(op, CPU)
    with pytest.raises(backend.BackendError, match="bogus"):
        ops.rademacher(0, 0, (3,))


@pytest.mark.parametrize("wish", ["", "auto", "cpp", "reference", "cuda", "triton", "bogus"])
def test_info_prints_its_table_under_every_wish(wish, monkeypatch, capsys):
    monkeypatch.setenv("AUTOFLIP_BACKEND", wish)
    assert cli.main(["info"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "squared_matmul" in out
    assert out.count("wanted auto or one of") == (wish == "bogus")
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["wish"] == (wish or "auto")
    nowhere = wish == "cuda" and not torch.cuda.is_available()
    assert bool(facts["wish_error"]) == (wish == "bogus" or nowhere)
    rows = {row["op"]: row for row in facts["kernels"] if row["device"] == "cpu"}
    if wish == "cuda":
        assert rows["masked_matmul"]["backend"] == "-"
        assert nowhere or "cuda runs on CUDA tensors only" in rows["masked_matmul"]["why_not"]
    if wish == "bogus":
        assert all(row["backend"] == "-" for row in rows.values())


@pytest.mark.parametrize("level, note", [("bogus", "AUTOFLIP_CPU='bogus' is ignored"), ("base", ""), ("", "")])
def test_info_names_an_instruction_set_that_does_not_exist(level, note):
    if backend.unavailable("cpp", "cpu"):
        pytest.skip("no C++ extension")
    done = subprocess.run(
        [sys.executable, "-m", "autoflip", "info", "--json"],
        env={**os.environ, "AUTOFLIP_CPU": level},
        capture_output=True,
        text=True,
        check=True,
    )
    cpp = json.loads(done.stdout)["extensions"]["cpp"]
    assert note in cpp["note"]
    assert bool(cpp["note"]) == bool(note)
    assert level != "base" or cpp["isa"] == "base"
