"""The command line: options become overrides, mistakes become one line, what was stopped can go on."""

import json
import os
import signal
import subprocess
import sys
import types
from subprocess import PIPE

import pytest
import torch
from fake_run import records, summarize, write_run
from test_report import check_page

import autoflip
from autoflip import cli


class FakeFed(types.ModuleType):
    """Stands for autoflip.fed: remembers its calls and writes the run folder of fake_run."""

    def __init__(self):
        super().__init__("autoflip.fed")
        self.calls, self.overrides, self.stop_at = [], [], None
        self.Config = types.SimpleNamespace(load=self.load)

    def load(self, path=None, overrides=()):
        if path is not None and not path.exists():
            raise FileNotFoundError(path)
        self.overrides = list(overrides)
        values = {
            "fed.method": "autoflip",
            "fed.against": "fedavg",
            "fed.rounds": 4,
            "fed.seed": 0,
            "data.name": "digits",
        }
        lines = path.read_text().splitlines() if path is not None else []
        for line in [*lines, *overrides]:
            key, _, value = line.partition("=")
            if key.split(".")[0] not in ("fed", "data", "model", "prune"):
                raise ValueError(f"unknown configuration key {key!r}")
            try:
                values[key] = json.loads(value)
            except ValueError:
                values[key] = value
        sections = {key.split(".")[0]: types.SimpleNamespace() for key in values}
        for key, value in values.items():
            setattr(sections[key.split(".")[0]], key.split(".")[1], value)
        return types.SimpleNamespace(**sections)

    def run(self, config, *, out=None, sinks=()):
        self.calls.append(("run", config, out))
        out.mkdir(parents=True, exist_ok=True)
        text = "\n".join(f"{s}.{k}={json.dumps(v)}" for s, part in vars(config).items() for k, v in vars(part).items())
        (out / "config.toml").write_text(text)
        return self._go(config, out, sinks)

    def resume(self, run_dir, sinks=()):
        self.calls.append(("resume", run_dir))
        return self._go(self.load(run_dir / "config.toml"), run_dir, sinks)

    def _go(self, config, out, sinks):
        names = [name for name in (config.fed.method, config.fed.against) if name != "none"]
        by_method = {name: records(name, seed=config.fed.seed, rounds=config.fed.rounds) for name in names}
        lines = [by_method[name][at] for at in range(config.fed.rounds) for name in names]
        with (out / "records.jsonl").open("w") as file:
            for number, line in enumerate(lines):
                if number == self.stop_at:
                    raise KeyboardInterrupt
                file.write(json.dumps(line) + "\n")
                for sink in sinks:
                    sink(types.SimpleNamespace(**line, as_dict=lambda line=line: line))
        summary = summarize(by_method)
        (out / "summary.json").write_text(json.dumps(summary))
        return types.SimpleNamespace(summary=summary)


@pytest.fixture
def fed(monkeypatch):
    fake = FakeFed()
    monkeypatch.setitem(sys.modules, "autoflip.fed", fake)
    monkeypatch.setattr(autoflip, "fed", fake, raising=False)
    return fake


def one_error(capfd, code, words, *arguments):
    assert cli.main(arguments) == code
    out = capfd.readouterr()
    assert out.err.startswith("autoflip: error: ")
    assert out.err.count("\n") == 1
    assert words in out.err
    assert "Traceback" not in out.out + out.err


def test_options_become_overrides(fed, tmp_path, capsys):
    root = tmp_path / 'a "quoted" folder'
    assert (
        cli.main(
            [
                "run",
                "--dataset",
                "fashion-mnist",
                "--data-root",
                str(root),
                "--method",
                "autoflip",
                "--against",
                "fedavg",
            ]
            + [
                "--model",
                "twocnn",
                "--seed",
                "7",
                "--rounds",
                "5",
                "--set",
                "prune.density=0.2",
                "--set",
                "data.alpha=0.1",
            ]
            + ["--out", str(tmp_path / "run")]
        )
        == 0
    )
    assert fed.overrides == [
        'data.name="fashion-mnist"',
        f"data.root={json.dumps(str(root))}",
        'model.name="twocnn"',
        'fed.method="autoflip"',
        'fed.against="fedavg"',
        "fed.seed=7",
        "fed.rounds=5",
        "prune.density=0.2",
        "data.alpha=0.1",
    ]
    assert (tmp_path / "run" / "report.html").is_file()
    out = capsys.readouterr().out
    assert "Final accuracy" in out
    assert str(tmp_path / "run" / "report.html") in out


def test_plain_lines_off_a_terminal(fed, tmp_path, capsys):
    assert cli.main(["run", "--rounds", "40", "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " round " in line]
    assert len(lines) == 2 * 11  # the first, then every fourth
    assert "round 40/40" in lines[-1]
    assert "\x1b" not in "".join(lines)


def test_bars_on_a_terminal(fed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["run", "--rounds", "3", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "3/3" in out
    assert "accuracy" in out


def test_quiet_prints_the_report_only(fed, tmp_path, capsys):
    assert cli.main(["run", "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"


def test_without_out_a_folder_is_named(fed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "-q"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-autoflip-seed0-")


def test_ctrl_c_says_how_to_go_on(fed, tmp_path, capfd):
    fed.stop_at = 3
    assert cli.main(["run", "--out", str(tmp_path / "run")]) == 130
    assert capfd.readouterr().err == f"autoflip: stopped; continue with: autoflip resume {tmp_path / 'run'}\n"
    fed.stop_at = None
    assert cli.main(["resume", str(tmp_path / "run"), "-q"]) == 0
    assert fed.calls[-1] == ("resume", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


def test_compare_runs_each_once_and_goes_on_where_it_stopped(fed, tmp_path, capsys):
    command = ["compare", "--methods", "autoflip, fedavg", "--seeds", "2", "--out", str(tmp_path / "c")]
    fed.stop_at = 3
    assert cli.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    fed.stop_at = None
    assert cli.main(command) == 0
    assert [call[0] for call in fed.calls] == ["run", "resume", "run", "run", "run"]
    assert {(call[1].fed.method, call[1].fed.against, call[1].fed.seed) for call in fed.calls if call[0] == "run"} == {
        (method, "none", seed) for method in ("autoflip", "fedavg") for seed in (0, 1)
    }
    content = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [run["folder"] for run in content["runs"]] == [
        f"{m}-seed{s}" for m in ("autoflip", "fedavg") for s in (0, 1)
    ]
    assert (tmp_path / "c" / "compare.html").is_file()
    assert "±" in capsys.readouterr().out

    assert cli.main(command) == 0
    assert len(fed.calls) == 5, "finished runs are not run again"
    assert cli.main(["report", str(tmp_path / "c")]) == 0
    assert capsys.readouterr().out.endswith("compare.html\n")


def test_compare_does_not_mix_settings(fed, tmp_path, capfd):
    assert cli.main(["compare", "--seeds", "1", "-q", "--out", str(tmp_path / "c")]) == 0
    capfd.readouterr()
    one_error(capfd, 1, "other settings", "compare", "--seeds", "1", "--rounds", "9", "--out", str(tmp_path / "c"))


@pytest.mark.parametrize(
    "code, words, arguments",
    [
        (2, "No such command", ["nonsense"]),
        (2, "--nonsense", ["run", "--nonsense"]),
        (2, "'--rounds'", ["run", "--rounds", "many"]),
        (2, "--seeds", ["compare", "--seeds", "0"]),
        (2, "compare chooses fed.seed itself", ["compare", "--set", "fed.seed=7"]),
        (2, "compare chooses fed.method itself", ["compare", "--set", "fed.method=ssfl"]),
        (2, "names no method", ["compare", "--methods", " , "]),
        (2, "unknown configuration key 'nope.x'", ["run", "--set", "nope.x=1"]),
        (2, "there is no configuration file missing.toml", ["run", "missing.toml"]),
        (2, "holds no run", ["resume", "/nowhere"]),
        (1, "there is no run folder", ["report", "/nowhere"]),
        (2, "has no config.toml", ["export", "/nowhere", "--onnx", "m.onnx"]),
        (2, "RUN_DIR", ["export"]),
    ],
)
def test_a_mistake_is_one_line(fed, capfd, code, words, arguments):
    one_error(capfd, code, words, *arguments)


def test_errors_of_a_run_are_one_line(fed, tmp_path, capfd, monkeypatch):
    def broken(config, *, out=None, sinks=()):
        out.mkdir()
        raise ValueError("data set 'x':\n  file y is damaged")

    monkeypatch.setattr(fed, "run", broken)
    one_error(capfd, 1, "data set 'x': file y is damaged", "run", "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists(), "an empty run folder is not left behind"
    monkeypatch.setattr(fed, "run", lambda *_, **__: 1 / 0)
    one_error(capfd, 1, "internal error, ZeroDivisionError", "run", "--out", str(tmp_path / "run"))
    monkeypatch.setenv("AUTOFLIP_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "--out", str(tmp_path / "run")])


def test_export_without_onnx_says_what_to_install(fed, tmp_path, capfd, monkeypatch):
    folder = write_run(tmp_path / "run")
    for name in ("model.safetensors", "masks.safetensors"):
        (folder / name).write_bytes(b"")
    monkeypatch.setattr("autoflip.cli.export.find_spec", lambda name: None)
    one_error(capfd, 2, "pip install onnx onnxscript", "export", str(folder), "--onnx", str(tmp_path / "m.onnx"))


def test_info_for_people_and_programs(capsys):
    assert cli.main(["info"]) == 0
    assert "served by" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"autoflip", "python", "machine", "extensions", "kernels", "wish"} <= facts.keys()
    assert all(row.keys() == {"op", "device", "backend", "why_not"} for row in facts["kernels"])


def test_info_shows_what_trials_found(capsys, tmp_path, monkeypatch):
    from autoflip.ops import trials

    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    trials.forget()
    trials.choose("masked_linear 200x784 n64 forward", {"dense": lambda: None})
    trials.forget()
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("  masked_linear 200x784 n64 forward: dense\n", "1 choices"))
    assert "more:" not in out
    for i in range(30):
        trials.choose(f"masked_linear {i}x784 n64 forward", {"dense": lambda: None})
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.count("n64 forward: dense\n") == 20
    assert "  and 11 more: autoflip info --json" in out


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"autoflip {autoflip.__version__}\n"
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("run", "compare", "resume", "report", "export", "info"))


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "autoflip", "run", "--nope"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("autoflip: error: ")
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_our_letters_is_served(tmp_path):
    folder = tmp_path / "ß"
    write_run(folder)
    done = subprocess.run(
        [sys.executable, "-m", "autoflip", "report", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("?/report.html\n")


SMALL = ["--rounds", "2", "--set", "fed.clients=4", "--set", "fed.fraction=0.5", "--set", "data.samples_per_client=40"]


def test_a_real_run_its_report_and_its_model(tmp_path, capfd):
    folder = tmp_path / "run"
    assert cli.main(["run", *SMALL, "--out", str(folder)]) == 0
    assert "Final accuracy" in capfd.readouterr().out
    check_page(folder)
    assert {"config.toml", "model.safetensors", "masks.safetensors"} <= {path.name for path in folder.iterdir()}
    one_error(capfd, 1, "already holds a run", "run", *SMALL, "--out", str(folder))
    assert cli.main(["resume", str(folder), "-q"]) == 0, "a finished run resumes to itself"
    capfd.readouterr()
    (folder / "checkpoint.afck").write_bytes(b"AFCK1 not really")
    one_error(capfd, 1, "damaged", "resume", str(folder))

    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from safetensors.torch import load_file

    from autoflip.fed import data, models

    assert cli.main(["export", str(folder), "--onnx", str(tmp_path / "m.onnx")]) == 0
    (tmp_path / "m.onnx").rename(tmp_path / "elsewhere.onnx")  # the weights are inside
    digits = data.load("digits")
    name = models.default_for("digits")
    model = models.build(name, input_shape=digits.input_shape, num_classes=digits.num_classes)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    session = ort.InferenceSession(str(tmp_path / "elsewhere.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: digits.test.x[:33].numpy()})
    want = model.eval()(digits.test.x[:33]).detach()
    # float32 sums of at most 1,000 terms of size 10, in another order
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-3)


def test_a_real_comparison(tmp_path, capfd):
    command = ["compare", "--seeds", "2", *SMALL, "--out", str(tmp_path / "c")]
    assert cli.main(command) == 0
    before = (tmp_path / "c" / "compare.json").read_text()
    assert cli.main(command) == 0
    assert "done before" in capfd.readouterr().out
    assert (tmp_path / "c" / "compare.json").read_text() == before


def test_ctrl_c_in_a_real_run_then_resume(tmp_path):
    command = [sys.executable, "-m", "autoflip", "run", *SMALL, "--rounds", "6", "--out", str(tmp_path / "run")]
    # a shell's background job ignores Ctrl-C, and its children with it
    start = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, preexec_fn=start) as process:
        next(line for line in process.stdout if " round " in line)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1]
    assert process.returncode == 130
    assert error == f"autoflip: stopped; continue with: autoflip resume {tmp_path / 'run'}\n"
    assert cli.main(["resume", str(tmp_path / "run"), "-q"]) == 0
    assert cli.main(["run", *SMALL, "--rounds", "6", "--out", str(tmp_path / "whole"), "-q"]) == 0
    stopped, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    for key in ("final_accuracy", "best_accuracy", "flops", "bytes_up", "bytes_down"):
        assert stopped["method"][key] == whole["method"][key]
        assert stopped["against"][key] == whole["against"][key]


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("did you mean 'digits'", ["--dataset", "digit"]),
        ("prune.density=3.0 is out of range", ["--set", "prune.density=3"]),
        ("fed.method='autoflop'", ["--method", "autoflop"]),
        ("did you mean 'fed.rounds'", ["--set", "fed.rouns=3"]),
        ("/nowhere", ["--dataset", "mnist", "--data-root", "/nowhere"]),
    ],
)
def test_a_real_mistake_is_one_line(tmp_path, capfd, words, arguments):
    code = 1 if "--dataset" in arguments else 2
    one_error(capfd, code, words, "run", *arguments, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
