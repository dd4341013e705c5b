"""The commands: each turns its options into configuration overrides, calls the library and shows the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from autoflip.cli.errors import Stopped, UsageMistake
from autoflip.cli.overrides import load_config, overrides_of

__all__ = ["app"]

app = typer.Typer(
    name="autoflip",
    help="Federated learning that is cheap for real: every FLOP, byte and second is measured.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Configuration; options override it.")]
Dataset = Annotated[str | None, typer.Option("--dataset", metavar="NAME", help="Data set (data.name).")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="Folder of the data (data.root).")]
ModelName = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Model, or module:callable.")]
Rounds = Annotated[int | None, typer.Option("--rounds", metavar="N", help="Rounds (fed.rounds).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Any other key; may be repeated.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write into.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table: only where the report is.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder that `autoflip run` wrote.")]


def _version(wanted: bool) -> None:
    if wanted:
        from autoflip import __version__

        print(f"autoflip {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@contextmanager
def stoppable(hint: str) -> Iterator[None]:
    """Turn Ctrl-C inside into :class:`Stopped` with a hint how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(hint) from None


def _show(run_dir: Path, summary: dict[str, Any], quiet: bool) -> None:
    from rich.console import Console

    from autoflip import report

    page = report.write(run_dir)
    if quiet:
        print(page)
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(report.summary_table(summary))
    console.print(report.headline(summary), markup=False, style="bold")
    console.print(f"Report: {page}", markup=False)


@app.command()
def run(
    config: ConfigFile = None,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    model: ModelName = None,
    method: Annotated[str | None, typer.Option("--method", metavar="M", help="Method (fed.method).")] = None,
    against: Annotated[str | None, typer.Option("--against", metavar="M", help="Rival, or none.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed (fed.seed).")] = None,
    rounds: Rounds = None,
    set_: Set = None,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Train a method and its rival on this machine."""
    from autoflip import fed
    from autoflip.cli.progress import watch

    options = overrides_of(
        data__name=dataset,
        data__root=data_root and data_root.expanduser().resolve(),
        model__name=model,
        fed__method=method,
        fed__against=against,
        fed__seed=seed,
        fed__rounds=rounds,
    )
    wanted = load_config(config, options + (set_ or []))
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out or Path("runs") / f"{wanted.data.name}-{wanted.fed.method}-seed{wanted.fed.seed}-{stamp}"
    new = not folder.exists()
    try:
        with stoppable(f"continue with: autoflip resume {folder}"), watch(wanted, quiet=quiet) as sink:
            result = fed.run(wanted, out=folder, sinks=[sink])
    finally:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of it
    _show(folder, result.summary, quiet)


@app.command()
def resume(run_dir: RunDir, quiet: Quiet = False) -> None:
    """Finish a run that was stopped.

    The result equals that of an uninterrupted run.
    """
    from autoflip import fed
    from autoflip.cli.progress import watch

    if not (run_dir / "config.toml").is_file():
        raise UsageMistake(f"{run_dir} holds no run (there is no config.toml); wanted a folder that autoflip run made")
    config = load_config(run_dir / "config.toml", [])
    with stoppable(f"continue with: autoflip resume {run_dir}"), watch(config, quiet=quiet) as sink:
        result = fed.resume(run_dir, sinks=[sink])
    _show(run_dir, result.summary, quiet)


@app.command()
def compare(
    config: ConfigFile = None,
    methods: Annotated[str, typer.Option(metavar="A,B", help="Methods, separated by commas.")] = "autoflip,fedavg",
    seeds: Annotated[int, typer.Option(metavar="N", help="Seeds 0 to N-1 for each method.", min=1)] = 3,
    dataset: Dataset = None,
    data_root: DataRoot = None,
    model: ModelName = None,
    rounds: Rounds = None,
    set_: Set = None,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods with several seeds.

    What is already done in --out is not run again.
    """
    from autoflip.cli.compare import run_all

    options = overrides_of(
        data__name=dataset,
        data__root=data_root and data_root.expanduser().resolve(),
        model__name=model,
        fed__rounds=rounds,
    )
    with stoppable("the same command goes on from here"):
        run_all(config, options + (set_ or []), methods, seeds, out, quiet)


@app.command("report")
def write_report(run_dir: RunDir) -> None:
    """Write the page of a finished run again."""
    from autoflip import report

    print(report.compare_report(run_dir) if (run_dir / "compare.json").is_file() else report.write(run_dir))


@app.command()
def export(
    run_dir: RunDir,
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="Where to write the compact model.")],
) -> None:
    """Write the trained, compact model as ONNX."""
    from autoflip.cli.export import to_onnx

    print(to_onnx(run_dir, onnx))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show the machine and which kernel serves which op."""
    from autoflip.cli.info import collect, show

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
