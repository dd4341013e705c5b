"""libFuzzer on the C++ core under AddressSanitizer and UBSan, with the corpus beside this file.

``AUTOFLIP_FUZZ_SECONDS`` says how long (default 5). For an hour, and to keep what it finds:
``AUTOFLIP_FUZZ_SECONDS=3600 AUTOFLIP_FUZZ_CORPUS=DIR pytest tests/fuzz/test_fuzz_core.py``.
Where no clang++ is installed, clang_of_wheels.py makes one.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = int(os.environ.get("AUTOFLIP_FUZZ_SECONDS", "5"))
SAN = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-std=c++17", "-ffp-contract=off"]


def flags_of(level):
    """Return the compiler flags setup.py gives to a source of this instruction set."""
    found = re.search(rf'"{level}": "([^"]*)"(?:\s*"([^"]*)")?', (ROOT / "setup.py").read_text())
    return [f for f in " ".join(g for g in found.groups() if g).split() if "prefer-vector" not in f]


def build(cxx, folder):
    """Compile core and harness; return the program, or the compiler's complaint."""
    objects = []
    levels = ["base", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["base"]
    sources = [(ROOT / f"csrc/cpu/delta_{level}.cpp", flags_of(level) if level != "base" else []) for level in levels]
    if len(levels) > 1:
        rows = (ROOT / f"csrc/cpu/{name}_avx512.cpp" for name in ("ans_rows", "huffman"))
        sources += [(source, flags_of("avx512")) for source in rows]
    names = ("ans_encode", "ans_decode", "cpu", "huffman", "huffman_decode")
    plain = [*(ROOT / f"csrc/cpu/{name}.cpp" for name in names), HERE / "fuzz_delta.cpp"]
    for source, flags in [*sources, *((source, []) for source in plain)]:
        objects.append(str(folder / (source.stem + ".o")))
        sanitize = "-fsanitize=fuzzer-no-link,address,undefined"
        command = [cxx, *SAN, sanitize, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr
    program = str(folder / "fuzz_delta")
    done = subprocess.run(
        [cxx, "-fsanitize=fuzzer,address,undefined", *objects, "-o", program], capture_output=True, text=True
    )
    return (program, "") if done.returncode == 0 else (None, done.stderr)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed: libFuzzer comes with it")
def test_the_core_survives_any_bytes(tmp_path):
    program, why = build(shutil.which("clang++"), tmp_path)
    if program is None and "fuzzer" in why:
        pytest.skip(f"this clang++ links no libFuzzer: {why[-200:]}")
    assert program, why[-3000:]
    corpus = Path(os.environ.get("AUTOFLIP_FUZZ_CORPUS", tmp_path / "corpus"))
    corpus.mkdir(exist_ok=True)
    command = [program, f"-max_total_time={SECONDS}", "-max_len=1200", "-rss_limit_mb=2048", "-timeout=10",
               f"-artifact_prefix={tmp_path}/", str(corpus), str(HERE / "corpus_core")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 300)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    print(f"{runs[1]} runs in {SECONDS} s", file=sys.stderr)
    assert int(runs[1]) > 100
