"""The way in: what set-up decides, says and refuses (on a tiny copy of the project), and what a wheel holds."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import autoflip

ROOT = Path(__file__).resolve().parents[1]
PROJECT = """
[build-system]
requires = ["setuptools>=40", {build}]
[project]
name = "tiny"
version = "1"
dependencies = ["torch>=2", {run}]
[project.optional-dependencies]
triton = []
test = ["pytest"]
lint = ["never-published-linter; python_version < '3'"]
"""
COMPILE = "from pathlib import Path; Path('autoflip/_C.fake.so').touch(); print('compiled')"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="set-up is a shell script")


@pytest.fixture
def project(tmp_path):
    """A project that sets up in a second: its own pyproject.toml, a setup.py that only touches a file."""

    def make(build="", run="", torch="2.13.0"):
        for folder in ("tools", "csrc", "autoflip"):
            (tmp_path / folder).mkdir()
        for name in ("tools/setup.sh", "tools/requirements.py", "Makefile"):
            shutil.copy(ROOT / name, tmp_path / name)
        (tmp_path / "pyproject.toml").write_text(PROJECT.format(build=build, run=run))
        (tmp_path / "constraints.txt").write_text(f"torch=={torch}\n")
        (tmp_path / "setup.py").write_text(COMPILE)
        (tmp_path / "csrc" / "a.cpp").touch()
        return tmp_path

    return make


def setup(folder, *arguments, python=sys.executable, **env):
    """Run set-up with no network and no active environment; return (exit status, what it said)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "VENV", "CXX", "MAKEFLAGS", "MAKELEVEL")}
    clean |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    clean |= {"PYTHON": str(python)} | {k: str(v) for k, v in env.items()}
    done = subprocess.run(["sh", "tools/setup.sh", *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.stdout == ""  # `make -s which-python` prints a path and nothing else
    return done.returncode, done.stderr


def stub(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_python_that_has_everything_is_used_as_it_is(project):
    folder = project()
    status, said = setup(folder)
    assert status == 0, said
    assert (folder / ".python").read_text().splitlines()[0] == sys.executable
    assert not (folder / ".venv").exists()
    assert "installing" not in said


def test_nothing_to_do_runs_nothing(project, tmp_path):
    folder = project()
    python = stub(tmp_path / "python", f'[ -f broken ] && exit 9; exec {sys.executable} "$@"')
    assert setup(folder, python=python)[0] == 0
    (folder / "broken").touch()
    assert setup(folder, python=python) == (0, "")
    # a changed source, another choice, a lost extension: each sets up again, and meets the broken interpreter
    os.utime(folder / "csrc/a.cpp", (2**32, 2**32))
    assert setup(folder, python=python)[0] == 1
    (folder / "broken").unlink()
    os.utime(folder / "csrc/a.cpp", (0, 0))
    assert "compiling" in setup(folder, python=python)[1]
    assert "compiling" in setup(folder, python=python, AUTOFLIP_CUDA=0)[1]
    (folder / "autoflip/_C.fake.so").unlink()
    assert "compiling" in setup(folder, python=python, AUTOFLIP_CUDA=0)[1]


def test_which_python_prints_only_the_interpreter(project):
    folder = project()
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "VENV", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-s", "which-python", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.stdout == sys.executable + "\n", done.stderr


def test_groups_are_installed_once(project):
    folder = project()
    setup(folder)
    assert "compiling" in setup(folder, "lint")[1]
    assert setup(folder, "lint") == setup(folder) == (0, "")


@pytest.mark.parametrize("version", ["3.9.18", "2.7.18"])
def test_an_old_python_is_refused(project, tmp_path, version):
    python = stub(tmp_path / "old", f"echo {version}; exit 1")
    status, said = setup(project(), python=python)
    assert status == 1
    assert re.search(f"is Python {version}; autoflip needs Python 3.10 or newer. Name one: make PYTHON=", said)


def test_no_python_and_no_compiler(project):
    folder = project()
    status, said = setup(folder, python="python-of-nobody")
    assert (status, "there is no python-of-nobody" in said) == (1, True)
    status, said = setup(folder, CXX="compiler-of-nobody -m64")
    assert (status, "no C++ compiler compiler-of-nobody -m64; install one" in said) == (1, True)


def test_a_folder_of_somebody_else_is_left_alone(project):
    folder = project(run='"never-published"')
    (folder / ".venv").mkdir()
    (folder / ".venv" / "mine").touch()
    status, said = setup(folder)
    assert (status, ".venv is there and was not made by this script" in said) == (1, True)
    assert (folder / ".venv" / "mine").exists()


def test_an_extra_that_cannot_be_had_is_named_and_the_rest_goes_on(project):
    folder = project(run='"never-published>=1.5"')
    status, said = setup(folder, VENV="")
    assert status == 0, said
    assert "could not install, for" in said
    assert "never-published>=1.5" in said
    assert (folder / ".python").exists()


@pytest.mark.slow
def test_a_torch_that_is_there_is_kept_in_the_new_environment(project):
    folder = project(run='"never-published>=1.5"')
    (folder / "setup.py").write_text(COMPILE + "; import setuptools; setuptools.setup(packages=[])")
    status, said = setup(folder)
    assert status == 0, said
    assert "could not install, for" in said
    python = (folder / ".python").read_text().splitlines()[0]
    assert python == str(folder / ".venv/bin/python")
    code = "import torch, pytest; print(torch.__file__)"
    got = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert got.stdout.strip() == sys.modules["torch"].__file__


def test_a_build_tool_that_cannot_be_had_ends_it(project):
    folder = project(build='"never-published>=1.5"')
    status, said = setup(folder, VENV="")
    assert status == 1
    assert "to compile: never-published>=1.5" in said
    assert not (folder / ".python").exists()


def test_an_active_environment_is_used_instead_of_making_one(project, tmp_path):
    (tmp_path / "active" / "bin").mkdir(parents=True)
    stub(tmp_path / "active" / "bin" / "python", f'exec {sys.executable} "$@"')
    (tmp_path / "path").mkdir()
    stub(tmp_path / "path" / "python3", '[ "$1" = -c ] && echo 3.11.0 || exit 1')
    folder = project()
    path = f"{tmp_path / 'path'}:{os.environ['PATH']}"
    status, said = setup(folder, python="python3", VIRTUAL_ENV=tmp_path / "active", PATH=path)
    assert status == 0, said
    assert (folder / ".python").read_text().splitlines()[0] == sys.executable
    assert not (folder / ".venv").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.path.exists("/dev/nvidiactl"), reason="for Linux without a GPU")
def test_the_cuda_build_is_never_fetched_for_a_machine_without_gpu(project):
    folder = project(torch="99.0")
    text = (folder / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(text.replace("torch>=2", "torch>=99"))
    status, said = setup(folder, VENV="")
    assert status == 1
    assert "torch==99.0+cpu" in said
    assert "no CPU build of torch 99.0" in said
    assert "was not fetched instead" in said
    assert "torch==99.0\n" not in said


def test_versions_and_licence_agree():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{autoflip.__version__}"' in project
    assert 'license = "Apache-2.0"' in project
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:100]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT]
    env = os.environ | {"AUTOFLIP_CUDA": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in ("autoflip/__init__.py", "autoflip/py.typed", "autoflip/kernels/__init__.py", "autoflip/fed/data.py"):
        assert wanted in names
    assert any(re.fullmatch(r"autoflip/_C\..*so", name) for name in names)
    assert {name.split("/")[0] for name in names} == {"autoflip", f"autoflip-{autoflip.__version__}.dist-info"}
