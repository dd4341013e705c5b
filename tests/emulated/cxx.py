"""A stand-in for g++ that builds the AVX-512 code for a CPU with AVX2 only, so that its tests run there, slowly.

    git clone https://github.com/simd-everywhere/simde SIMDE_DIR
    git clone . COPY && cd COPY
    SIMDE=SIMDE_DIR CXX="python $PWD/tests/emulated/cxx.py" AUTOFLIP_CUDA=0 make test

SIMDe makes several AVX2 instructions of each 512-bit one. What it lacks is in avx512.h, with masked loads and stores
that touch nothing else, as the CPU's own do. What the compiler makes of the real instructions is not tested so.

Environment:
    SIMDE               SIMDe's checkout, while building
    EMULATED_WITHOUT    while running: features that the CPU is to lack ("avx512vbmi avx512bf16")
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HAS = 'std::getenv("EMULATED_WITHOUT")==nullptr||std::strstr(std::getenv("EMULATED_WITHOUT"),x)==nullptr'


def arguments(words, simde):
    """Return what g++ is to be called with instead of ``words``."""
    name = next((Path(word).name for word in words if word.endswith(".cpp")), "")
    if name == "cpu.cpp":
        return [f"-D__builtin_cpu_supports(x)=({HAS})", *words]
    if not name.endswith(("_avx512.cpp", "_bf16.cpp")):
        return words
    # -O3 would take minutes a file over what SIMDe makes of it
    kept = ["-O1" if word == "-O3" else word for word in words if not (word.startswith("-m") and "512" in word)]
    bf16 = ["-DEMULATED_BF16"] if name.endswith("_bf16.cpp") else []
    return ["-mavx2", *bf16, "-w", "-Wno-psabi", f"-I{simde}", "-include", str(HERE / "avx512.h"), *kept]


if __name__ == "__main__":
    if "-E" not in sys.argv and "SIMDE" not in os.environ:
        sys.exit("cxx.py: SIMDE is not set; wanted the folder of https://github.com/simd-everywhere/simde")
    os.execvp("g++", ["g++", *arguments(sys.argv[1:], os.environ.get("SIMDE"))])
