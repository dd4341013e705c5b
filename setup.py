"""Build autoflip's extension modules with ninja: no torch at build time, CUDA where nvcc is.

Environment:
    AUTOFLIP_CUDA         auto (default: build the CUDA part when nvcc works) | 1 (fail without it) | 0 (skip it)
    AUTOFLIP_CUDA_ARCHS   semicolon list of compute capabilities, default "80;90;100" (the last one also as PTX)
    AUTOFLIP_SANITIZE     for example "address,undefined": a debug build of the CPU part
    CXX, CUDA_HOME        the compilers to use
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
# sources end in _avx2, _avx512, _bf16 or _amx.cpp when they need that instruction set; dispatch happens at run time;
# prfchw: prefetchw does nothing on a CPU that does not know it
ISA = {
    "avx2": "-mavx2 -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt -mf16c -mprfchw",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt -mf16c -mprfchw "
    "-mprefer-vector-width=512",
}


def newer_flags(*flags: str) -> str:
    """Return AVX-512's flags and these; none for compilers that do not know them, to which such sources are empty."""
    cxx = os.environ.get("CXX", "g++")
    try:
        known = not subprocess.run(
            [*cxx.split(), *flags, "-E", "-x", "c++", os.devnull], capture_output=True
        ).returncode
    except OSError:  # no compiler: the build says so
        known = False
    return " ".join([ISA["avx512"], *flags]) if X86 and known else ""


ISA["bf16"] = newer_flags("-mavx512bf16")
ISA["amx"] = newer_flags("-mavx512bf16", "-mamx-tile", "-mamx-bf16")


def isa(source: str) -> str | None:
    """Return the instruction set a source is written for, None for portable code."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in ISA else None


def link_order(source: str) -> tuple[int, str]:
    """Return the key by which sources are linked: portable ones first.

    Of an inline function that several objects hold, the linker keeps the first: no copy with instructions that a CPU
    lacks may come before one without.
    """
    found = isa(source)
    return (list(ISA).index(found) + 1 if found else 0, source)


def find_nvcc() -> tuple[str | None, str]:
    """Return (path of nvcc or None, why not)."""
    wish = os.environ.get("AUTOFLIP_CUDA", "auto")
    if wish == "0":
        return None, "AUTOFLIP_CUDA=0"
    homes = [str(Path(d, "bin")) for d in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if d]
    for path in (os.pathsep.join(homes) or None, None, "/usr/local/cuda/bin"):
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc, ""
    if wish == "1":
        sys.exit("autoflip: AUTOFLIP_CUDA=1, but there is no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda")
    return None, "no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"


def rules(nvcc: str | None, sanitize: str) -> list[str]:
    """Return ninja's four rules: C++ object, C++ module, CUDA object, CUDA module."""
    import pybind11

    paths = (pybind11.get_include(), sysconfig.get_path("include"), ROOT / "csrc")
    include = " ".join(f"-I{p}" for p in paths)
    cxx = os.environ.get("CXX", "g++")
    opt = f"-O1 -g -fno-omit-frame-pointer -fsanitize={sanitize}" if sanitize else "-O3 -DNDEBUG"
    archs = [a for a in os.environ.get("AUTOFLIP_CUDA_ARCHS", "80;90;100").split(";") if a]
    codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
    codes += f" -gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    depend = "-MMD -MF $out.d -std=c++17"
    tail = f"{include} -c $in -o $out\n depfile = $out.d\n deps = gcc"
    link = f"-fsanitize={sanitize}" if sanitize else "-s"
    if sys.platform == "linux":
        link += " -Wl,--wrap=GOMP_parallel"  # see csrc/cpu/one_thread.cpp
    warn = "-Wall -Wextra -ffp-contract=off -fno-trapping-math"
    return [
        f"rule cxx\n command = {cxx} {depend} -fPIC -fvisibility=hidden -fopenmp {warn} {opt} $isa {tail}",
        f"rule so\n command = {cxx} -shared -fopenmp {link} $in -o $out",
        # a spilled register or local memory is a slow kernel: it fails the build
        f"rule cu\n command = {nvcc} {depend} -O3 -lineinfo --threads 2 -Xfatbin -compress-all {codes} "
        f"-Xptxas -warn-spills,-warn-lmem-usage,-Werror -Xcompiler -fPIC,-fvisibility=hidden {tail}",
        f"rule cuso\n command = {nvcc} -shared -cudart static -Xlinker --exclude-libs,ALL -Xlinker -s $in -o $out",
    ]


class NinjaBuild(build_ext):
    """Compile with per-file flags through ninja (setuptools alone has none) and write down what was left out."""

    def build_extensions(self) -> None:
        import ninja

        sanitize = os.environ.get("AUTOFLIP_SANITIZE", "")
        work = ROOT / "build" / f"{sys.implementation.cache_tag}-{sanitize.replace(',', '-') or 'opt'}"
        work.mkdir(parents=True, exist_ok=True)  # editable installs throw build_temp away
        lines = rules(NVCC, sanitize)
        outputs: dict[str, Path] = {}
        for extension in self.extensions:
            objects = []
            # compiled in the reverse order of linking: widest vectors take longest, and are not to be waited for
            for source in sorted(extension.sources, key=link_order, reverse=True):
                objects.insert(0, str(work / (source.replace("/", "_") + ".o")))
                rule = "cu" if source.endswith(".cu") else "cxx"
                lines.append(f"build {objects[0]}: {rule} {ROOT / source}\n isa = {ISA.get(isa(source) or '', '')}")
            out = Path(self.get_ext_fullpath(extension.name)).resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
            outputs[extension.name] = out
            lines.append(f"build {out}: {'cuso' if extension.name.endswith('_cuda') else 'so'} {' '.join(objects)}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        program = shutil.which("ninja") or f"{ninja.BIN_DIR}/ninja"
        ninja_run = [program, "--quiet", "-C", str(work)]
        notes = [] if NVCC else [f"_cuda: not built: {NO_NVCC}"]
        # all modules at once, so that no core waits for a module's last file; where one fails, one by one
        together = subprocess.run([*ninja_run, *map(str, outputs.values())], capture_output=True, text=True)
        if not together.returncode:
            print(together.stdout + together.stderr, end="", file=sys.stderr)
        for extension in self.extensions if together.returncode else ():
            done = subprocess.run([*ninja_run, str(outputs[extension.name])])
            if done.returncode and not extension.optional:
                sys.exit(f"autoflip: {extension.name} did not build; the compiler's message is above")
            if done.returncode:
                notes.append(f"_cuda: not built: {NVCC} failed (its message is in the build log)")
                outputs[extension.name].unlink(missing_ok=True)
        for note in notes:
            print(f"autoflip: {note}", file=sys.stderr)
        # read by `autoflip info`, so that a missing part says why long after the build
        self.notes = outputs["autoflip._C"].parent / "_build.txt"
        self.notes.write_text("\n".join(notes) + "\n")
        self.built = {name for name, path in outputs.items() if path.exists()}

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if e.name in self.built]
        super().copy_extensions_to_source()
        shutil.copy(self.notes, ROOT / "autoflip" / "_build.txt")


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


if not (ROOT / "autoflip" / "kernels" / "__init__.py").exists():
    sys.exit("autoflip: autoflip/kernels must be a link to ../kernels; on Windows: git config core.symlinks true")

NVCC, NO_NVCC = find_nvcc()
extensions = [
    Extension(
        "autoflip._C",
        [s for s in sources("csrc/cpu/*.cpp") if X86 or isa(s) in (None, "bf16", "amx")] + sources("csrc/bind*.cpp"),
    )
]
if NVCC and sources("csrc/cuda/*.cu"):
    required = os.environ.get("AUTOFLIP_CUDA") == "1"
    extensions.append(Extension("autoflip._cuda", sources("csrc/cuda/*.c*"), optional=not required))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
