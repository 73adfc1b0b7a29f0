"""Kernels written by hand, rendered and run against NumPy: every feature of the loop language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from flame.compiler.pipeline import load, source_of
from flame.core import dtypes
from flame.core.errors import CompileError
from flame.core.types import tensor_type
from flame.kernel import values
from flame.kernel.builder import KernelBuilder
from flame.kernel.values import const, read
from flame.runtime import cpu

F32 = dtypes.float32


def run(k: KernelBuilder, *arrays: np.ndarray) -> None:
    """Launch a finished kernel on arrays, in the order of its operands."""
    bound = k.bind()
    step = load(bound, source_of(bound.kernel))
    scratch = [np.zeros(n * cpu.get_num_threads(), np.uint8) for n in step.scratch]
    pointers = [a.ctypes.data for a in (*arrays, *scratch)]
    cpu.launch(step.address, step.extent, step.grain, *pointers, *step.sizes)


def operand(k: KernelBuilder, role: Any, array: np.ndarray, position: int = 0) -> Any:
    strides = tuple(s // array.itemsize for s in array.strides)
    type_ = tensor_type(dtypes.from_numpy(array.dtype), array.shape, strides)
    return k.tensor(role, position, type_)


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 64, 100])
def test_vector_loops_mask_their_rest(size: int) -> None:
    x = np.arange(size, dtype=np.float32)
    out = np.full(size + 1, -1, np.float32)
    k = KernelBuilder("double")
    source, target = operand(k, "input", x), operand(k, "output", out)
    with k.parallel(1), k.vector(k.size(size)) as i:
        k.store(target, (i,), source[i] * 2.0)
    run(k, x, out)
    np.testing.assert_array_equal(out[:-1], x * 2)
    assert out[-1] == -1


@pytest.mark.parametrize("size", [1, 7, 16, 33, 200])
@pytest.mark.parametrize(
    ("combine", "numpy", "start"),
    [
        ("add", np.sum, 0.0),
        ("max", np.max, -np.inf),
        ("min", np.min, np.inf),
        ("mul", np.prod, 1.0),
    ],
)
def test_accumulation_across_a_vector_loop(
    size: int, combine: str, numpy: Callable[..., Any], start: float
) -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.5, size).astype(np.float32)
    out = np.zeros(1, np.float32)
    k = KernelBuilder("fold")
    source, target = operand(k, "input", x), operand(k, "output", out)
    with k.parallel(1):
        total = k.register(start, F32)
        with k.vector(k.size(size), 2) as i:
            k.accumulate(total, combine, source[i])
        k.store(target, (const(0),), read(total))
    run(k, x, out)
    np.testing.assert_allclose(out[0], numpy(x), rtol=1e-5)


def test_serial_loop_inside_a_vector_loop_carries_lanes() -> None:
    x = np.random.default_rng(1).standard_normal((9, 21)).astype(np.float32)
    out = np.zeros_like(x)
    k = KernelBuilder("scan")
    source, target = operand(k, "input", x), operand(k, "output", out)
    with k.parallel(1), k.vector(k.size(21)) as j:
        total = k.register(0.0, F32)
        with k.loop(k.size(9)) as i:
            k.accumulate(total, "add", source[i, j])
            k.store(target, (i, j), read(total))
    run(k, x, out)
    np.testing.assert_allclose(out, np.cumsum(x, 0), rtol=1e-5)


def test_gather_and_scatter_with_masks() -> None:
    x = np.arange(50, dtype=np.float32)
    index = np.random.default_rng(2).permutation(50).astype(np.int64)
    gathered, scattered = np.zeros(50, np.float32), np.full(50, -1, np.float32)
    k = KernelBuilder("gather")
    source, where = operand(k, "input", x), operand(k, "input", index, 1)
    first, second = operand(k, "output", gathered), operand(k, "output", scattered, 1)
    with k.parallel(1), k.vector(k.size(50)) as i:
        at = where[i]
        even = values.compare("eq", at % 2, const(0))
        k.store(first, (i,), source.load(at, where=even, otherwise=const(7.0, F32)))
        k.store(second, (at,), source[i], where=even)
    run(k, x, index, gathered, scattered)
    np.testing.assert_array_equal(gathered, np.where(index % 2 == 0, x[index], 7))
    expected = np.full(50, -1, np.float32)
    expected[index[index % 2 == 0]] = x[index % 2 == 0]
    np.testing.assert_array_equal(scattered, expected)


def test_conditions_merge_registers() -> None:
    x = np.array([3, -1, 4, -1, 5], np.float32)
    out = np.zeros(2, np.float32)
    k = KernelBuilder("choose")
    source, target = operand(k, "input", x), operand(k, "output", out)
    with k.parallel(1):
        best, place = k.register(-1e30, F32), k.register(0, dtypes.int64)
        with k.loop(k.size(5)) as i, k.when(source[i] > read(best)):
            k.assign(best, source[i])
            k.assign(place, i)
        k.store(target, (const(0),), read(best))
        k.store(target, (const(1),), values.cast(read(place), F32))
    run(k, x, out)
    assert out.tolist() == [5, 4]


def test_all_values_are_read_before_any_is_written() -> None:
    x, y = np.arange(20, dtype=np.float32), np.arange(20, dtype=np.float32) * 10
    k = KernelBuilder("swap")
    a, b = operand(k, "output", x), operand(k, "output", y, 1)
    with k.parallel(1), k.vector(k.size(20)) as i:
        k.store_all([(a, (i,), b[i]), (b, (i,), a[i])])
    run(k, x, y)
    np.testing.assert_array_equal(x, np.arange(20) * 10)
    np.testing.assert_array_equal(y, np.arange(20))


def test_a_stored_value_is_loaded_anew() -> None:
    out = np.zeros(1, np.float32)
    k = KernelBuilder("count")
    target = operand(k, "output", out)
    with k.parallel(1), k.loop(k.size(10)):
        k.store(target, (const(0),), target[const(0)] + 1.0)
        k.store(target, (const(0),), target[const(0)] + 1.0)
    run(k, out)
    assert out[0] == 20


@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_belongs_to_a_worker(threads: int) -> None:
    before = cpu.get_num_threads()
    cpu.set_num_threads(threads)
    try:
        x = np.random.default_rng(3).standard_normal((64, 33)).astype(np.float32)
        out = np.zeros_like(x)
        k = KernelBuilder("reverse")
        source, target = operand(k, "input", x), operand(k, "output", out)
        held = k.scratch(F32, (33,))
        with k.parallel(64, work=40000) as (row,):
            with k.vector(k.size(33)) as i:
                k.store(held, (i,), source[row, i])
            with k.vector(k.size(33)) as i:
                k.store(target, (row, i), held[const(32) - i])
        run(k, x, out)
        np.testing.assert_array_equal(out, x[:, ::-1])
    finally:
        cpu.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "int8", "bool", "int16"])
def test_casts_to_float_and_back(dtype: str) -> None:
    kind = {d.name: d for d in dtypes.ALL}[dtype]
    x = np.array([0, 1, 2, 3, 100, 1.5, 2.5][: 2 if dtype == "bool" else 7]).astype(kind.numpy)
    wide, back = np.zeros(x.shape, np.float32), np.zeros_like(x)
    k = KernelBuilder("cast")
    source, target = operand(k, "input", x), operand(k, "output", wide)
    again = operand(k, "output", back, 1)
    with k.parallel(1), k.vector(k.size(len(x))) as i:
        value = values.cast(source[i], F32)
        k.store_all([(target, (i,), value), (again, (i,), value)])
    run(k, x, wide, back)
    np.testing.assert_array_equal(wide, x.astype(np.float32))
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("op", ["floordiv", "mod"])
def test_integer_division_rounds_down_and_never_traps(op: str) -> None:
    low = np.iinfo(np.int64).min
    pairs = [(7, 2), (-7, 2), (7, -2), (-7, -2), (5, 0), (low, -1), (0, 3), (6, 3)]
    a, b = (np.array(c, np.int64) for c in zip(*pairs, strict=True))
    out = np.zeros_like(a)
    k = KernelBuilder("divide")
    x, y = operand(k, "input", a), operand(k, "input", b, 1)
    target = operand(k, "output", out)
    with k.parallel(1), k.vector(k.size(len(a))) as i:
        k.store(target, (i,), values.binary(op, x[i], y[i]))
    run(k, a, b, out)
    with np.errstate(all="ignore"):
        expected = (a // b) if op == "floordiv" else (a % b)
    np.testing.assert_array_equal(out, np.where(b == 0, 0, expected))


def test_gemm_in_parallel_iterations() -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal((5, 8, 8)).astype(np.float32) for _ in range(2))
    out = np.zeros_like(a)
    k = KernelBuilder("products")
    x, y = operand(k, "input", a), operand(k, "input", b.transpose(0, 2, 1), 1)
    target = operand(k, "output", out)
    zero = const(0)
    with k.parallel(5, work=40000) as (n,):
        k.gemm(
            const(8),
            const(8),
            const(8),
            x.matrix(n, zero, zero),
            y.matrix(n, zero, zero, transposed=True),
            target.matrix(n, zero, zero),
        )
    run(k, a, b, out)
    np.testing.assert_allclose(out, a @ b.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)


def unfinished(k: KernelBuilder, _: Sequence[Any]) -> None:
    k.bind()


def nested(k: KernelBuilder, operands: Sequence[Any]) -> None:
    with k.parallel(1), k.vector(k.size(20)) as i, k.vector(k.size(20)) as j:
        k.store(operands[0], (i,), values.cast(j, F32))
    source_of(k.bind().kernel)


def carried(k: KernelBuilder, operands: Sequence[Any]) -> None:
    with k.parallel(1):
        last = k.register(0.0, F32)
        with k.vector(k.size(20)) as i:
            k.assign(last, values.cast(i, F32))
    source_of(k.bind().kernel)


@pytest.mark.parametrize(
    ("write", "message"),
    [(unfinished, "outermost parallel"), (nested, "nested vector"), (carried, "across a vector")],
)
def test_wrong_kernels_are_refused(write: Callable[..., None], message: str) -> None:
    k = KernelBuilder("wrong")
    target = operand(k, "output", np.zeros(20, np.float32))
    with pytest.raises(CompileError, match=message):
        write(k, [target])
