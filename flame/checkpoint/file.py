"""One checkpoint, one safetensors file.

Invariants: the file at ``path`` is at all times either the previous checkpoint or the new one,
whole (written beside it, flushed to the disk, then renamed over it); and a file whose bytes changed
after they were written is never loaded (a CRC-32 of every tensor and of the state is in its
header).

The writer is our own, as the library's gives no hold on the flush, and makes files that only their
owner may read. Other programs read the file as any safetensors file; the nested state that is no
tensor is JSON in its metadata, so that there is one atomic unit.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flame.checkpoint.atomic import written_beside
from flame.checkpoint.tree import Array, join, split
from flame.core.errors import CheckpointError

FORMAT, STATE, STATE_CHECKSUM, CHECKSUMS = (
    "flame.format",
    "flame.state",
    "flame.state_checksum",
    "flame.checksums",
)
VERSION = "1"
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def save(state: object, path: str | os.PathLike[str]) -> None:
    """Writes ``state`` to ``path``, whole or not at all.

    ``state`` is a state_dict, or dicts, lists and tuples of tensors (each kept in its dtype,
    bfloat16 included), NumPy arrays, numbers, strings and None. A crash, a full disk or a lost
    connection at any moment leaves the previous file at ``path`` as it was.

    Raises ArgumentError for a value that cannot be saved, CheckpointError where the file cannot be
    written.
    """
    target = Path(path)
    arrays, text = split(state)
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # aligned
    with written_beside(target) as file:
        file.write(_header(ordered, text))
        for array in ordered.values():
            file.write(_bytes(array))


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` wrote to ``path``; of a safetensors file by another program, its tensors by name.

    Raises CheckpointError, with the path and what to do, for a file that is missing, truncated,
    damaged, or no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        what = "a folder, not a file" if source.is_dir() else "not there"
        raise CheckpointError(f"load: the checkpoint {source} is {what}; check the path")
    try:
        with safe_open(source, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names: list[str] = list(file.keys())
            arrays: dict[str, Array] = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise CheckpointError(f"load: cannot read the checkpoint {source}: {error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(source, str(error)) from error
    if not any(key.startswith("flame.") for key in metadata):
        return join(arrays, json.dumps({name: {"$tensor": name} for name in arrays}))
    text = _verified(source, metadata, arrays)
    return join(arrays, text)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"load: {path} is damaged or no checkpoint ({reason}); nothing was loaded. "
        "Use a copy of it, or start a new run"
    )


def _verified(path: Path, metadata: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    """The JSON text of the state, once every checksum holds."""
    missing = {FORMAT, STATE, STATE_CHECKSUM, CHECKSUMS} - metadata.keys()
    if missing:
        raise _damaged(path, f"its header lacks {', '.join(sorted(missing))}")
    if metadata[FORMAT] != VERSION:
        raise CheckpointError(
            f"load: {path} has format {metadata[FORMAT]!r}, and this FLAME reads {VERSION!r}; "
            "load it with the version that wrote it"
        )
    if metadata[STATE_CHECKSUM] != _checksum(metadata[STATE].encode()):
        raise _damaged(path, "its state does not match its checksum")
    expected = _checksums(arrays)
    if metadata[CHECKSUMS] != json.dumps(expected, separators=(",", ":")):
        try:
            written = json.loads(metadata[CHECKSUMS])
            wrong = [n for n in expected.keys() | written.keys() if expected.get(n) != written[n]]
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong = ["its header"]
        raise _damaged(path, f"checksum mismatch in {', '.join(sorted(wrong)[:3]) or 'its header'}")
    return metadata[STATE]


def _checksum(data: bytes | memoryview, start: int = 0) -> str:
    return f"{zlib.crc32(data, start):08x}"


def _checksums(arrays: Mapping[str, Array]) -> dict[str, str]:
    """By name, in the order of names; dtype and shape count too."""
    return {
        name: _checksum(_bytes(arrays[name]), zlib.crc32(json.dumps(_entry(arrays[name])).encode()))
        for name in sorted(arrays)
    }


def _entry(array: Array) -> dict[str, object]:
    name = array.dtype.newbyteorder("=").name
    if name not in _NAMES:
        raise CheckpointError(f"save: a checkpoint cannot hold an array of dtype {array.dtype}")
    return {"dtype": _NAMES[name], "shape": list(array.shape)}


def _bytes(array: Array) -> memoryview:
    """The elements of ``array`` in C order, little-endian, without a copy where they are so."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def _header(arrays: Mapping[str, Array], text: str) -> bytes:
    """The length in eight bytes, and the JSON of a safetensors file whose data follow in order."""
    header: dict[str, object] = {
        "__metadata__": {
            FORMAT: VERSION,
            STATE: text,
            STATE_CHECKSUM: _checksum(text.encode()),
            CHECKSUMS: json.dumps(_checksums(arrays), separators=(",", ":")),
        }
    }
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {**_entry(array), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
