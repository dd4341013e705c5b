"""``autoflip compare``: every method with every seed, each in its own run folder, done ones not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoflip.cli.errors import UsageMistake
from autoflip.cli.overrides import load_config

__all__ = ["run_all"]


def run_all(path: Path | None, overrides: list[str], methods: str, seeds: int, out: Path | None, quiet: bool) -> None:
    """Run what is missing, then write compare.json and compare.html and print the table.

    Args:
        path: configuration file, or None.
        overrides: ``section.key=value``, for every run alike.
        methods: names separated by commas.
        seeds: number of seeds, from 0.
        out: folder of the comparison; None: ``runs/compare-DATASET``.
        quiet: print only where the page is.

    Raises:
        UsageMistake: no method, or a configuration key is wrong.
        ValueError: the folder holds a run with other settings.
    """
    from rich.console import Console

    from autoflip import report
    from autoflip.report.runs import put_text

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise UsageMistake(f"--methods={methods!r} names no method; wanted for example autoflip,fedavg")
    for key in ("fed.method", "fed.seed", "fed.against"):
        if any(override.partition("=")[0].strip() == key for override in overrides):
            raise UsageMistake(
                f"compare chooses {key} itself: it runs each of --methods alone, for the first --seeds seeds; leave "
                f"--set {key} out"
            )
    # all of them before the first starts: a wrong name must not show up after an hour
    configs = {
        (name, seed): load_config(path, [*overrides, f'fed.method="{name}"', 'fed.against="none"', f"fed.seed={seed}"])
        for name in names
        for seed in range(seeds)
    }
    folder = out or Path("runs") / f"compare-{next(iter(configs.values())).data.name}"
    runs = []
    for number, ((name, seed), config) in enumerate(configs.items(), start=1):
        _run_one(config, folder / f"{name}-seed{seed}", quiet, f"[{number}/{len(configs)}] seed {seed} ")
        runs.append((name, seed, f"{name}-seed{seed}"))
    content = report.collect(folder, runs)
    put_text(folder / "compare.json", json.dumps(content, indent=2) + "\n")
    page = report.compare_report(folder)
    if quiet:
        print(page)
        return
    console = Console(highlight=False)
    console.print(report.compare_table(content))
    console.print(f"Report: {page}", markup=False, soft_wrap=True)


def _run_one(config: Any, folder: Path, quiet: bool, prefix: str) -> None:
    from autoflip import fed, report
    from autoflip.cli.progress import watch

    started = (folder / "config.toml").is_file()
    if started and fed.Config.load(folder / "config.toml") != config:
        raise ValueError(
            f"{folder} holds a run with other settings than this comparison; name another --out, or remove that folder"
        )
    if started and (folder / "summary.json").is_file():
        if not quiet:
            print(f"{prefix}{config.fed.method}: done before")
    else:
        with watch(config, quiet=quiet, prefix=prefix) as sink:
            if started and (folder / "records.jsonl").is_file():
                fed.resume(folder, sinks=[sink])
            else:
                fed.run(config, out=folder, sinks=[sink])
    report.write(folder)
