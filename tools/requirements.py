"""Print what pyproject.toml asks for and the running Python lacks, one requirement a line.

Usage: python tools/requirements.py GROUP...   (build = to compile, run = to use, or an optional group's name)

Needs Python 3.10 and pip's own vendored libraries, nothing else: it runs before anything is installed.
"""

import sys
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement


def lacks(line: str) -> bool:
    """Return whether the requirement applies to this Python and is not met."""
    wish = Requirement(line)
    if wish.marker and not wish.marker.evaluate():
        return False
    try:
        return not wish.specifier.contains(metadata.version(wish.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return True


def main(groups: list[str]) -> None:
    content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    optional = content["project"]["optional-dependencies"]
    lists = {"build": content["build-system"]["requires"], "run": content["project"]["dependencies"], **optional}
    for group in groups:
        for line in lists[group]:
            if lacks(line):
                print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
