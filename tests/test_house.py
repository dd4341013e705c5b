"""The laws of the house (DESIGN, section 2): imports point down the floors, files stay short, nothing is unpickled."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "ops": 1,
    **dict.fromkeys(("masks", "groups", "prune", "codec", "curvature", "meter"), 2),
    **dict.fromkeys(("cuts", "flow", "layers", "rules"), 2),  # parts of groups and prune
    **dict.fromkeys(("nn", "explore"), 3),
    "fed": 4,
    **dict.fromkeys(("report", "loggers", "cli", "__main__"), 5),
}
EXTENSIONS = ("_C", "_cuda", "kernels")  # floor 0
MAX_LINES = 330
MENDING = "Move the shared part to the floor below both, or pass it in as an argument (tests/test_house.py, FLOORS)."


def module_of(path, root):
    """autoflip/nn/linear.py -> ["autoflip", "nn", "linear"]; a package is named without its __init__."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(tree, module, is_package):
    """Yield (line, absolute dotted name) of every import, relative ones resolved, import_module("x") included."""
    package = module if is_package else module[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # "from autoflip import fed" may mean the module autoflip.fed
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def broken_laws(root):
    """Every broken law below ``root``, in words."""
    found = []
    for path in sorted([*root.glob("autoflip/**/*.py"), *root.glob("kernels/**/*.py")]):
        if path.is_relative_to(root / "autoflip" / "kernels"):
            continue  # the link to kernels/, which is read itself
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        module, tree = module_of(path, root), ast.parse(text)
        if module[0] == "autoflip" and len(text.splitlines()) > MAX_LINES:
            found.append(f"{where} has {len(text.splitlines())} lines, more than {MAX_LINES}: split it by idea.")
        imports = list(imports_of(tree, module, path.name == "__init__.py"))
        judge = _kernel_law if module[0] == "kernels" else _floor_law
        for line, name in imports:
            found += [f"{where}:{line} {why}" for why in judge(module, name)]
            if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib") and where not in CIFAR:
                found.append(f"{where}:{line} imports {name}: nothing is unpickled here, except CIFAR's batches.")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", "") == "torch":
                found.append(f"{where}:{node.lineno} calls torch.load, which unpickles; use safetensors.")
    return found


# the reader's unpickler admits numpy arrays and plain containers only; its own tests feed it hostile files
CIFAR = ("autoflip/fed/readers.py",)


# of Flower what its apps see; what lies below moves from one release to the next
FLOWER = re.compile(r"flwr\.(app|clientapp|serverapp|serverapp\.strategy)\.[A-Z]\w*")


def _floor_law(module, name):
    parts = name.split(".")
    if parts[0] == "flwr" and not (module[1:2] == ["integrations"] and FLOWER.fullmatch(name)):
        yield f"imports {name}: autoflip.integrations may, and names of flwr.app, .clientapp and .serverapp only."
    if parts[0] == "kernels":
        yield "imports a top-level module named kernels; the kernels are autoflip.kernels, for autoflip.ops only."
    if parts[0] != "autoflip" or len(parts) < 2:
        return
    here, there = module[1] if len(module) > 1 else "", parts[1]
    if there in EXTENSIONS and here != "ops":
        yield f"imports autoflip.{there}: only autoflip.ops may, it is the one door to the kernels."
    if there == "integrations" and here != "integrations":
        yield "imports autoflip.integrations: it stands beside the house, nobody imports it."
    if here in ("", "integrations"):
        return  # the package itself names every floor, lazily; integrations may look at all
    if here not in FLOORS:
        yield f"is in autoflip.{here}, which has no floor: give it one in tests/test_house.py and DESIGN section 2."
    elif FLOORS.get(there, 0) > FLOORS[here]:
        yield (
            f"imports autoflip.{there} (floor {FLOORS[there]}) from autoflip.{here} (floor {FLOORS[here]}): "
            f"imports point down. {MENDING}"
        )


def _kernel_law(module, name):
    first = name.split(".")[0]
    if first not in ("torch", "triton", "kernels", "__future__", "math", "typing", "functools", "collections"):
        yield f"imports {name}: kernels import torch and triton only."


def test_the_house_stands():
    assert broken_laws(ROOT) == []


PLANTED = [
    ("autoflip/ops/bad.py", "from autoflip.masks import MaskSet", "imports point down"),
    ("autoflip/masks_.py", "x = 1\nimport autoflip.nn", "has no floor"),
    ("autoflip/prune.py", "from autoflip import nn", r"autoflip/prune.py:1 .*floor 3.*floor 2"),
    ("autoflip/nn/bad.py", "from ..fed import loop", "imports point down"),
    ("autoflip/nn/bad.py", "def f():\n    from .. import report", "bad.py:2 .*imports point down"),
    ("autoflip/fed/bad.py", "from importlib import import_module\nimport_module('autoflip.cli')", "imports point down"),
    ("autoflip/codec.py", "from autoflip import _C", "only autoflip.ops may"),
    ("autoflip/nn/bad.py", "import autoflip.kernels.delta", "only autoflip.ops may"),
    ("autoflip/ops/bad.py", "import kernels.delta", "top-level module"),
    ("autoflip/cli/bad.py", "import autoflip.integrations.flower", "nobody imports it"),
    ("autoflip/fed/bad.py", "from flwr.app import Message", "autoflip.integrations may"),
    ("autoflip/integrations/flower/bad.py", "from flwr.supercore import log", "serverapp only"),
    ("autoflip/integrations/flower/bad.py", "import flwr.app", "serverapp only"),
    ("kernels/bad.py", "import numpy", "torch and triton only"),
    ("kernels/bad.py", "from autoflip.ops import reference", "torch and triton only"),
    ("autoflip/fed/bad.py", "import pickle", "nothing is unpickled"),
    ("autoflip/fed/bad.py", "import torch\nx = torch.load('f')", "use safetensors"),
    ("autoflip/report/bad.py", "x = 1\n" * (MAX_LINES + 1), "split it by idea"),
]
ALLOWED = [
    ("autoflip/ops/good.py", "from autoflip import _C\nfrom autoflip.kernels import delta\nfrom . import backend"),
    ("autoflip/codec.py", "from autoflip.masks import MaskSet\nfrom autoflip import ops, __version__"),
    ("autoflip/integrations/flower.py", "from autoflip import fed, report"),
    (
        "autoflip/integrations/flower/good.py",
        "from flwr.serverapp.strategy import FedAvg\nfrom flwr.app import Message",
    ),
    ("autoflip/__init__.py", "from autoflip import fed"),
    ("autoflip/fed/readers.py", "import pickle"),
    ("kernels/good.py", "import torch, triton\nimport triton.language as tl\nfrom .tiles import x"),
]


def plant(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return broken_laws(root)


@pytest.mark.parametrize("path, text, words", PLANTED)
def test_a_planted_break_is_named(tmp_path, path, text, words):
    laws = plant(tmp_path, path, text)
    assert len(laws) == 1
    assert laws[0].startswith(path)
    assert re.search(words, laws[0])


@pytest.mark.parametrize("path, text", ALLOWED)
def test_what_is_allowed_passes(tmp_path, path, text):
    assert plant(tmp_path, path, text) == []


def portable_part(text):
    """C++ source as CPUs other than x86-64 see it: without comments and what stands under ``__x86_64__`` alone."""
    lines, asked = [], []  # of each open condition: whether it is of x86-64, and its other half
    for line in re.sub(r"//.*", "", text).splitlines():
        if line.startswith("#if"):
            asked.append("x86" if "__x86_64__" in line else "")
        elif line.startswith(("#else", "#elif")):
            asked[-1] = asked[-1] and "else"
        elif line.startswith("#endif"):
            asked.pop()
        elif "x86" not in asked:
            lines.append(line)
    return "\n".join(lines)


def test_portable_sources_ask_for_no_table_of_an_instruction_set():
    """An extension that does has an undefined symbol on an ARM device, and cannot be loaded there."""
    sources = [p for p in (ROOT / "csrc").rglob("*.cpp") if not re.search("_(avx2|avx512|bf16)$", p.stem)]
    assert len(sources) > 20
    for path in [*sources, *(ROOT / "csrc").glob("*.h")]:
        found = re.findall(r"\w+_(?:avx2|avx512)\b|\w+Avx(?:2|512)\b", portable_part(path.read_text()))
        assert not found, f"{path.relative_to(ROOT)} names {found}: wrap it in __x86_64__, or write AUTOFLIP_PICK"
    text = "#if defined(__x86_64__)\na_avx2\n#if X\nb\n#endif\n#else\nc\n#endif\nd // e_avx2\n"
    assert portable_part(text).split() == ["c", "d"]
