"""Hostile frames for as long as one likes; test_codec_fuzz.py does the same for seconds.

    python tests/fuzz/fuzz_frames.py --count 1000000 [--seed 0]     # mutations of our own, no other library
    python tests/fuzz/fuzz_frames.py --atheris [-max_total_time=60] CORPUS     # coverage-guided, where atheris is

Every input is signed (length and CRC-32 put right), so that the checks behind the checksum are reached.
"""

import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


def plain(count, seed):
    from test_codec_fuzz import FRAMES, mutated, sign, survives

    rng, names, start = random.Random(seed), list(FRAMES), time.perf_counter()
    for i in range(count):
        blob, decode = FRAMES[names[i % len(names)]]
        survives(sign(mutated(blob, rng)), decode)
        if (i + 1) % 50_000 == 0:
            print(f"{i + 1} frames, {time.perf_counter() - start:.0f} s", flush=True)


def guided(arguments):
    import atheris
    import torch  # noqa: F401 - not instrumented, like all else that is imported by now

    with atheris.instrument_imports(include=["autoflip.codec", "autoflip.ops"]):
        import autoflip.codec  # noqa: F401
    from test_codec_fuzz import FRAMES, sign, survives

    decoders = [decode for _, decode in FRAMES.values()]

    def one(data):
        if data:
            survives(sign(data[1:]), decoders[data[0] % len(decoders)])

    corpus = Path(arguments[-1]) if arguments and not arguments[-1].startswith("-") else None
    if corpus:
        corpus.mkdir(exist_ok=True)
        for i, (blob, _) in enumerate(FRAMES.values()):
            (corpus / f"seed{i}").write_bytes(bytes([i]) + blob)
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if "--atheris" in sys.argv:
        guided([a for a in sys.argv[1:] if a != "--atheris"])
    else:
        options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        plain(int(options.get("--count", 100_000)), int(options.get("--seed", 0)))
