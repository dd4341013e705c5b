"""What every CPU may run holds no instruction that some lack."""

import bisect
import platform
import re
import shutil
import subprocess

import pytest
from emulated import cxx

from autoflip.ops import backend

# vectors beyond SSE, masks, and what BMI, LZCNT and POPCNT add
LATER = re.compile(r"%[yz]mm|%k[0-7]|^v[a-z]|^(andn|bextr|bls[ir]|[lt]zcnt|mulx|pdep|pext|popcnt|rorx|sarx|sh[lr]x)\b")


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86")
@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="no nm, no objdump")
def test_inline_functions_that_objects_share_are_portable():
    """The linker keeps one copy of each, whatever instruction set its object was compiled for (setup.link_order)."""
    module, why = backend.extension("_C")
    if module is None:
        pytest.skip(why)
    shared = []
    for line in said("nm", "-D", "-S", "--defined-only", module.__file__):
        start, size, kind, name = [*line.split(), "", "", ""][:4]
        if kind in ("W", "V"):
            shared.append((int(start, 16), int(start, 16) + int(size, 16), name))
    shared.sort()
    found = {}
    for line in said("objdump", "-d", "--no-show-raw-insn", module.__file__):
        if not (parts := re.match(r" *([0-9a-f]+):\t(.*)", line)):
            continue
        at = int(parts[1], 16)
        i = bisect.bisect_right(shared, (at, float("inf"))) - 1
        if i >= 0 and at < shared[i][1] and LATER.search(parts[2]):
            found.setdefault(shared[i][2], line)
    assert shared
    assert not found


def test_what_the_stand_in_compiler_changes():
    """tests/emulated builds the AVX-512 sources otherwise, and the file that looks at the CPU; nothing else."""
    common = ["-O3", "-mavx2", "-MF", "build/csrc_a_avx512.cpp.o.d", "-o", "build/csrc_a_avx512.cpp.o"]
    assert cxx.arguments(["-c", "csrc/cpu/a_avx2.cpp", *common], "S") == ["-c", "csrc/cpu/a_avx2.cpp", *common]
    built = cxx.arguments(["-c", "csrc/cpu/a_avx512.cpp", "-mavx512f", "-mprefer-vector-width=512", *common], "S")
    assert {"csrc/cpu/a_avx512.cpp", "-IS", "-O1", *common[1:]} < set(built)
    assert not {"-mavx512f", "-mprefer-vector-width=512", "-O3", "-DEMULATED_BF16"} & set(built)
    assert "-DEMULATED_BF16" in cxx.arguments(["csrc/cpu/coarse_bf16.cpp"], "S")
    assert cxx.arguments(["csrc/cpu/cpu.cpp"], "S")[0].startswith("-D__builtin_cpu_supports(x)=")
