"""A clang++ with libFuzzer, AddressSanitizer and UBSan where none is installed, out of two wheels (x86-64 Linux, g++):

    pip install --target WHEELS ziglang atheris
    python tests/fuzz/clang_of_wheels.py WHEELS DIR && PATH=DIR:$PATH pytest tests/fuzz/test_fuzz_core.py

ziglang's program holds a whole clang; atheris' library holds AddressSanitizer, UBSan and libFuzzer without main.
DIR gets a script ``clang++`` and a resource folder, in which clang finds both.
"""

import subprocess
import sys
from pathlib import Path

MAIN = """
#include <cstddef>
#include <cstdint>
extern "C" int LLVMFuzzerRunDriver(int*, char***, int (*)(const uint8_t*, size_t));
extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t);
int main(int count, char** words) { return LLVMFuzzerRunDriver(&count, &words, LLVMFuzzerTestOneInput); }
// the runtime is older than the compiler, and knows this check by another name
extern "C" void __ubsan_handle_function_type_mismatch_abort(void*, void*) { __builtin_trap(); }
"""


def make(wheels, folder):
    """Write ``folder/clang++``; ``wheels`` is where ziglang and atheris were installed."""
    zig, runtime = wheels / "ziglang", wheels / "asan_with_fuzzer.so"
    if missing := [str(p) for p in (zig / "zig", runtime) if not p.exists()]:
        sys.exit(f"{missing[0]} is missing; run: pip install --target {wheels} ziglang atheris")
    resources = folder / "resources"
    libraries = resources / "lib" / "x86_64-unknown-linux-gnu"
    libraries.mkdir(parents=True, exist_ok=True)
    for link, target in (
        (resources / "include", zig / "lib" / "include"),
        (libraries / "libclang_rt.asan.so", runtime),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    subprocess.run(["g++", "-xc++", "-c", "-", "-o", libraries / "main.o"], input=MAIN, text=True, check=True)
    for name, parts in (("fuzzer", ["main.o"]), ("asan-preinit", []), ("asan_static", [])):
        archive = libraries / f"libclang_rt.{name}.a"
        archive.unlink(missing_ok=True)
        subprocess.run(["ar", "rcs", archive.name, *parts], cwd=libraries, check=True)
    script = folder / "clang++"
    script.write_text(
        f'#!/bin/sh\nexec "{zig}/zig" clang --driver-mode=g++ --target=x86_64-unknown-linux-gnu '
        f'-resource-dir "{resources}" -shared-libasan "$@"\n'
    )
    script.chmod(0o755)


if __name__ == "__main__":
    make(*(Path(p).resolve() for p in sys.argv[1:3]))
