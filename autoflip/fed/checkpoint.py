"""The state of a run on disk: written whole or not at all, read back only if every byte is as written.

File: magic ``AFCK1\\n``, SHA-256 of the rest, then a safetensors file whose metadata holds the numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from autoflip.fed.state import Average, Guidance, ServerState, View
from autoflip.masks import MaskSet

__all__ = ["CheckpointError", "load", "save", "write_atomically"]

NAME = "checkpoint.afck"
_MAGIC = b"AFCK1\n"


class CheckpointError(ValueError):
    """A checkpoint is missing or damaged; the message says which file and what to do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a crash leaves either the old or the new file, whole."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def save(folder: Path, states: Mapping[str, ServerState], records: int, config: str) -> None:
    """Write the states of all methods, how many records had been written by then, and the config's fingerprint."""
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    about: dict[str, object] = {"records": records, "config": config, "methods": {}}
    for method, state in states.items():
        _put(tensors, f"{method}/params/", state.params)
        _put(tensors, f"{method}/memory/", state.memory)
        if state.average is not None:
            _put(tensors, f"{method}/average/", state.average.params)
        if state.guidance is not None:
            _put(tensors, f"{method}/importance/", state.guidance.importance)
            _put(tensors, f"{method}/agreement/", state.guidance.agreement)
            _put(tensors, f"{method}/weights/", state.guidance.weights)
        masks = {view.masks.fingerprint(): view.masks for view in state.views.values() if view.masks is not None}
        for kept in (state.masks, state.narrow):
            if kept is not None:
                masks[kept.fingerprint()] = kept
        for fingerprint, mask in masks.items():
            _put(tensors, f"{method}/masks/{fingerprint}/", mask)
        for view in state.views.values():
            _put(tensors, f"{method}/views/{view.id.hex()}/", view.params)
        about["methods"][method] = {  # type: ignore[index]
            "round": state.round,
            "masks": state.masks.fingerprint() if state.masks is not None else None,
            "narrow": state.narrow.fingerprint() if state.narrow is not None else None,
            "views": {v.id.hex(): v.masks.fingerprint() if v.masks is not None else None for v in state.views.values()},
            "held": {str(client): view.hex() for client, view in state.held.items()},
            "guidance": state.guidance is not None,
            "average": state.average.rounds if state.average is not None else None,
        }
    body = to_bytes(tensors, metadata={"autoflip": json.dumps(about)})
    write_atomically(folder / NAME, _MAGIC + hashlib.sha256(body).digest() + body)


def load(folder: Path, config: str) -> tuple[dict[str, ServerState], int]:
    """Read what :func:`save` wrote: (states, number of records).

    Raises:
        CheckpointError: there is none, it is damaged, or it was made under another configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = folder / NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"no checkpoint in {folder} ({error.strerror}); start the run again") from error
    head = len(_MAGIC) + 32
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(data[head:]).digest() != data[len(_MAGIC) : head]:
        raise CheckpointError(f"checkpoint {path} is damaged (its checksum does not match); start the run again")
    try:
        tensors = from_bytes(data[head:])
        about = _metadata(data[head:])
        if about["config"] != config:
            raise CheckpointError(
                f"{folder / 'config.toml'} is not the configuration that {path.name} was made under; "
                "put the old one back, or start a new run"
            )
        states = {method: _state(tensors, method, entry) for method, entry in about["methods"].items()}
        return states, int(about["records"])
    except CheckpointError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is not one of this version ({error}); start the run again") from error


def _metadata(body: bytes) -> dict:
    length = int.from_bytes(body[:8], "little")
    return json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["autoflip"])


def _put(tensors: dict[str, Tensor], prefix: str, values: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        tensors[prefix + name] = tensor.contiguous().clone()  # safetensors refuses shared memory


def _take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _state(tensors: Mapping[str, Tensor], method: str, entry: dict) -> ServerState:
    names = {f for f in [entry["masks"], entry["narrow"], *entry["views"].values()] if f is not None}
    masks = {f: MaskSet(_take(tensors, f"{method}/masks/{f}/")) for f in names}
    views = {
        bytes.fromhex(name): View(
            bytes.fromhex(name), _take(tensors, f"{method}/views/{name}/"), masks[f] if f is not None else None
        )
        for name, f in entry["views"].items()
    }
    return ServerState(
        params=_take(tensors, f"{method}/params/"),
        masks=masks[entry["masks"]] if entry["masks"] is not None else None,
        round=int(entry["round"]),
        views=views,
        held={int(client): bytes.fromhex(name) for client, name in entry["held"].items()},
        guidance=Guidance(*(_take(tensors, f"{method}/{part}/") for part in ("importance", "agreement", "weights")))
        if entry["guidance"]
        else None,
        memory=_take(tensors, f"{method}/memory/"),
        narrow=masks[entry["narrow"]] if entry["narrow"] is not None else None,
        average=Average(_take(tensors, f"{method}/average/"), int(entry["average"]))
        if entry["average"] is not None
        else None,
    )
