"""The attention kernels on a GPU, at sizes of many tiles, against float64 on the host."""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from flame.core import dtypes
from flame.core.errors import DeviceError
from flame.runtime.cuda.driver import driver

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))

from attention_cases import LIMITS, Case, Run, error, packed

bfloat16, float16 = dtypes.bfloat16, dtypes.float16
float32, float64 = dtypes.float32, dtypes.float64
noise = np.random.default_rng(11)


class Device:
    """Device 0 with a stream; `launch` is what `Run` takes, over arrays of the host."""

    def __init__(self):
        self.driver = driver()
        self.capability = self.driver.properties(0).capability
        self.driver.use(0)
        self.stream = self.driver.create_stream(0)

    @functools.cache  # noqa: B019 (one device a module)
    def function(self, text, symbol, shared):
        image = self.driver.compile(text, symbol, self.capability)
        return self.driver.function(self.driver.load_module(0, image), symbol, shared)

    def upload(self, root):
        pointer = self.driver.allocate(0, max(root.nbytes, 1), self.stream)
        self.driver.copy_to_device(pointer, root.ctypes.data, root.nbytes, self.stream)
        return pointer

    def launch(self, call, arrays):
        """Whole buffers travel, views keep their places in them."""
        roots = {}
        for array in arrays:
            if array is not None and id(root_of(array)) not in roots:
                roots[id(root_of(array))] = (root_of(array), self.upload(root_of(array)))
        pointers = [0 if a is None else place_of(a, roots[id(root_of(a))]) for a in arrays]
        words, _keep = packed(call, pointers)
        self.driver.launch(
            self.function(call.text, call.symbol, call.shared), call.grid, call.block, call.shared,
            self.stream, ctypes.addressof(words),
        )  # fmt: skip
        for root, pointer in roots.values():
            self.driver.copy_to_host(root.ctypes.data, pointer, root.nbytes, self.stream)
            self.driver.free(0, pointer, self.stream)
        self.driver.synchronize(self.stream)


def root_of(array):
    return array if array.base is None else array.base


def place_of(array, held):
    root, pointer = held
    return pointer + array.ctypes.data - root.ctypes.data


@pytest.fixture(scope="module")
def device():
    try:
        return Device()
    except DeviceError as missing:
        pytest.skip(str(missing))


def choices(*shape):
    made = noise.random(shape) > 0.3
    made[..., 0] = True
    return made


def biases(*shape, dtype=np.float32):
    return noise.standard_normal(shape).astype(dtype)


CASES = [
    Case(1, 2, 1, 1024, 1024, 128),
    Case(1, 2, 2, 2048, 2048, 128, causal=True, rows_first=True),
    Case(2, 4, 2, 1000, 777, 64, dtype=float16),
    Case(2, 4, 2, 777, 1000, 64, dtype=float16, causal=True),
    Case(1, 2, 1, 500, 600, 32),
    Case(1, 2, 1, 500, 600, 96, mask=choices(1, 1, 500, 600)),
    Case(1, 2, 1, 500, 600, 128, mask=biases(2, 500, 600), causal=True),
    Case(1, 2, 1, 500, 600, 40, 72, dtype=float16, mask=biases(600, dtype=np.float16)),
    Case(2, 4, 2, 500, 600, 128, mask=biases(1, 4, 1, 600), causal=True),  # ALiBi
    Case(2, 4, 2, 500, 600, 128, mask=biases(2, 1, 1, 600)),
    Case(1, 2, 1, 500, 600, 192, causal=True),
    Case(1, 2, 1, 500, 600, 256, dtype=float16),
    Case(1, 4, 2, 500, 600, 64, dropout=0.2, causal=True),
    Case(1, 2, 1, 500, 600, 256, dropout=0.2),
    Case(1, 2, 1, 500, 600, 64, dtype=float16, gap=3),
    Case(1, 2, 1, 500, 600, 128, dtype=float32, causal=True),
    Case(1, 2, 1, 300, 400, 64, dtype=float32, mask=choices(300, 400), dropout=0.1),
    Case(1, 2, 1, 300, 400, 256, dtype=float64),
    Case(1, 2, 1, 300, 400, 12, scale=-0.3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients(case, device):
    run = Run(case)
    run.forward(device.launch)
    run.backward(device.launch)
    for name, made, expected in zip(
        ("result", "log_sum", "dq", "dk", "dv"), run.made(), run.expected(), strict=True
    ):
        assert error(made, expected) < LIMITS[case.dtype.name], name


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
def test_runs_agree_bit_by_bit(dtype, device):
    case = Case(1, 4, 2, 700, 900, 64, dtype=dtype, causal=True, dropout=0.1)
    runs = Run(case), Run(case)
    for run in runs:
        run.forward(device.launch)
        run.backward(device.launch)
    for one, other in zip(runs[0].made(), runs[1].made(), strict=True):
        np.testing.assert_array_equal(one, other)
