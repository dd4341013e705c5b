"""What coarse codes cost in accuracy: the masked rounds of bench/real_deltas.py go on, uplinks coded in several ways.

    AUTOFLIP_DATA=DIR python bench/codec_accuracy.py [--cases mlp cnn] [--rounds 20] [--seeds 3] [--out FILE]

All ways start from the same saved model and see the same clients and batches in the same order; a seed changes these.
Accuracy is that of the mean of the last quarter of the rounds, on 5000 test samples; "error" the part of an
update, in norm, that rounding changes. 3 masked rounds have passed when this begins: training goes on.
"""

import argparse
import json
import statistics
from pathlib import Path

import real_deltas
import torch
from conftest import machine
from torch.nn import functional as F  # noqa: N812

from autoflip import codec, explore
from autoflip.fed import data, partition

WAYS = {
    "fp32": {"values": "fp32"},
    "int8, 127 levels": {"values": "int8"},
    "int8, 63 levels": {"values": "int8", "levels": 63},
    "int8, 40 levels": {"values": "int8", "levels": 40},
    "int4, 7 levels": {"values": "int4"},
}
DENSITY, SHOWN = 0.1, 5000


def error_of(sent, delta):
    """Norm of what rounding changed over the norm of the update."""
    gone = sum(float((sent[n] - t).double().square().sum()) for n, t in delta.items())
    return (gone / sum(float(t.double().square().sum()) for t in delta.values())) ** 0.5


@torch.no_grad()
def accuracy(model, test):
    model.eval()
    hits = [model(x).argmax(1).eq(y) for x, y in zip(test.x[:SHOWN].split(500), test.y[:SHOWN].split(500), strict=True)]
    return float(torch.cat(hits).float().mean())


def train(case, way, rounds, seed):
    """Return the accuracy, bytes a kept weight, and error of one run."""
    name, make_model, lr, samples, *_ = real_deltas.CASES[case]
    held, example = data.load(name), real_deltas.load(case, DENSITY)
    model = make_model(tuple(held.train.x.shape[1:]), held.num_classes)
    clients, a_round = real_deltas.CLIENTS, real_deltas.A_ROUND
    parts = partition.split(
        held.train, "dirichlet", clients=clients, seed=seed, num_classes=held.num_classes, alpha=0.3,
        samples_per_client=samples,
    )  # fmt: skip
    server, masks = {n: t.to(torch.float32) for n, t in example.old.items()}, example.masks
    schema, generator = codec.Schema.of(server), torch.Generator().manual_seed(seed)
    sent_as = {"masks": masks, "schema": schema}
    named = dict(model.named_parameters())
    for n, m in masks.items():
        named[n].register_hook(lambda g, m=m: g * m)
    kept = sum(int(masks[n].sum()) if n in masks else t.numel() for n, t in server.items())
    reached, sizes, errors = [], [], []
    for r in range(rounds):
        total, examples = {n: torch.zeros_like(t) for n, t in server.items()}, 0
        for client in torch.randperm(clients, generator=generator)[:a_round].tolist():
            model.load_state_dict(server, strict=False)
            model.train()
            x, y = held.train.x[parts[client]], held.train.y[parts[client]]
            explore.local_steps(
                model, x, y, F.cross_entropy, generator=generator, epochs=1, batch_size=32, lr=lr, momentum=0.9
            )
            delta = {n: t - server[n] for n, t in model.state_dict().items() if n in server}
            blob = codec.encode(delta, round=r, client=client, seed=seed, **sent_as, **way)
            codec.accumulate(blob, total, len(y), **sent_as)
            examples += len(y)
            sizes.append(len(blob) / kept)
            errors.append(error_of(codec.decode(blob, **sent_as), delta))
        server = {n: t + total[n] / examples for n, t in server.items()}
        if r >= rounds - max(1, rounds // 4):
            model.load_state_dict(server, strict=False)
            reached.append(accuracy(model, held.test))
    return statistics.mean(reached), statistics.mean(sizes), statistics.mean(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "codec-accuracy.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    result["machine"] = machine()
    for case in args.cases:
        rows = {}
        for label, way in WAYS.items():
            runs = [train(case, way, args.rounds, seed) for seed in range(args.seeds)]
            got, sizes, errors = zip(*runs, strict=True)
            rows[label] = {
                "accuracy": got,
                "bytes_a_kept_weight": statistics.mean(sizes),
                "error": statistics.mean(errors),
            }
            spread = statistics.stdev(got) if len(got) > 1 else 0.0
            apart = [g - d for g, d in zip(got, rows["fp32"]["accuracy"], strict=True)]
            print(
                f"{case} {label:18s} accuracy {statistics.mean(got):.4f} (sd of seeds {spread:.4f}), minus fp32 "
                f"{statistics.mean(apart):+.4f}, {rows[label]['bytes_a_kept_weight']:.3f} B, error "
                f"{rows[label]['error']:.4f}",
                flush=True,
            )
        result["cases"][case] = {"rounds": args.rounds, "seeds": args.seeds, "ways": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
