"""A checkpoint gives back what was saved, is whole at all times, and is never loaded damaged."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flame
from flame import checkpoint
from flame.core.errors import ArgumentError, CheckpointError

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")


def sample(dtype: str = "float32") -> np.ndarray[Any, Any]:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return (np.arange(24).reshape(2, 3, 4) % 7).astype(kind)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_keep_dtype_shape_and_bits(path: Path, dtype: str) -> None:
    tensors = {
        "block": flame.from_numpy(sample(dtype)),
        "empty": flame.from_numpy(sample(dtype)[:0]),
        "one": flame.from_numpy(sample(dtype)[0, 0, 1:2].reshape(())),
        "view": flame.from_numpy(sample(dtype)).permute(2, 0, 1),
    }
    checkpoint.save(tensors, path)
    loaded = checkpoint.load(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert isinstance(loaded[name], flame.Tensor)
        assert loaded[name].dtype == tensor.dtype
        assert tuple(loaded[name].shape) == tuple(tensor.shape)
        assert loaded[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_nested_state_keeps_its_types(path: Path) -> None:
    state = {
        "optimizer": {
            "state": {0: {"step": 3, "mean": flame.from_numpy(sample())}, 17: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 17], "none": None}],
        },
        "random": {"state": 2**127 + 1, "name": "PCG64", "key": np.arange(4, dtype=np.uint32)},
        "a": {"b": flame.from_numpy(sample())},
        "a.b": flame.from_numpy(sample() + 1),
        "$odd": [float("inf"), -0.0, 1e-310, True, np.float32(0.5)],
    }
    checkpoint.save(state, path)
    loaded = checkpoint.load(path)
    assert loaded["optimizer"]["state"].keys() == {0, 17}
    assert loaded["optimizer"]["state"][0]["step"] == 3
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert isinstance(loaded["optimizer"]["param_groups"][0]["betas"], tuple)
    assert loaded["random"]["state"] == 2**127 + 1
    assert isinstance(loaded["random"]["key"], np.ndarray)
    assert loaded["random"]["key"].dtype == np.uint32
    assert loaded["$odd"] == [float("inf"), 0.0, 1e-310, True, 0.5]
    assert np.array_equal(loaded["a.b"].numpy(), sample() + 1)
    assert np.array_equal(loaded["a"]["b"].numpy(), sample())


def test_other_programs_read_and_write_it(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint.save({"layer": {"weight": flame.from_numpy(sample())}}, path)
    assert np.array_equal(load_file(path)["layer.weight"], sample())
    save_file({"weight": sample(), "half": sample("bfloat16")}, path, {"format": "pt"})
    loaded = checkpoint.load(path)
    assert np.array_equal(loaded["weight"].numpy(), sample())
    assert loaded["half"].dtype == flame.bfloat16


def test_loaded_tensors_may_be_written(path: Path) -> None:
    checkpoint.save({"weight": flame.from_numpy(sample())}, path)
    loaded = checkpoint.load(path)["weight"]
    loaded.add_(1)
    assert np.array_equal(loaded.numpy(), sample() + 1)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"a": {"b": object()}}, r"a\.b is a object"),
        ({"a": {1.5: 2}}, "key of a is a float"),
        ({"a": np.array(["x"])}, "dtype"),
    ],
)
def test_what_cannot_be_saved_is_refused(path: Path, state: object, told: str) -> None:
    with pytest.raises((ArgumentError, CheckpointError), match=told):
        checkpoint.save(state, path)
    assert list(path.parent.iterdir()) == []


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not there"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.save({}, tmp_path / "nowhere" / "file")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Not a directory"):
        checkpoint.save({}, tmp_path / "file" / "file")


def written(path: Path) -> bytes:
    state = {"weight": flame.from_numpy(sample()), "half": flame.from_numpy(sample("bfloat16"))}
    checkpoint.save({"model": state, "epoch": 3}, path)
    return path.read_bytes()


def test_every_truncation_is_refused(path: Path) -> None:
    whole = written(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_every_flipped_byte_is_refused(path: Path) -> None:
    whole = written(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    padding = {index for index in range(header) if whole[index : index + 1] == b" "}
    for index in range(len(whole)):
        for mask in (0x01, 0x20, 0xFF):
            if index in padding:
                continue
            damaged = bytearray(whole)
            damaged[index] ^= mask
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"damaged|format"):
                checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" * 20, b"{}" * 30, b"\xff" * 64])
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        checkpoint.load(path)


def test_a_file_of_a_later_format_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame.checkpoint.file.VERSION", "2")
    written(path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="load it with the version that wrote it"):
        checkpoint.load(path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_keeps_the_previous_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    whole = written(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the file .* untouched"):
        checkpoint.save({"weight": flame.from_numpy(sample())}, path)
    monkeypatch.undo()
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]


FULL_DISK = """
import resource, sys
import numpy as np
import flame
from flame import checkpoint
from flame.core.errors import CheckpointError

flame.zeros(1).add_(1)  # the kernel cache may be written to before the limit holds
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save({"weight": flame.from_numpy(np.ones(1_000_000, np.float32))}, sys.argv[1])
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_fills_up_keeps_the_previous_file(path: Path) -> None:
    whole = written(path)
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert "File too large" in told
    assert "untouched" in told
    assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]
