"""Random bits by counter: Philox4x32-10, and numbers made of them.

Element i (in row-major order) of a draw takes the block of counter ``offset + i`` under the key
``seed``, both of 64 bits; a draw of n elements moves the generator's offset on by n. So a number
depends on seed, offset and position alone: not on layout, threads, device, or whether the step was
compiled.

Dropout needs one word an element, so four elements share a block: element i takes word i // 16 % 4
of block ``offset + i // 64 * 16 + i % 16``, and a draw moves the offset on by 16 for each 64
elements begun. Runs of 16 elements are runs of blocks, which suits vectors and warps alike.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.kernel.values import Value, binary, bitcast, cast, compare, const, select, unary

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)  # of the golden ratio and the root of 3
ROUNDS: Final = 10
UNIFORM_BITS: Final = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}

Words = tuple[Value, Value, Value, Value]


def _halves(x: Value) -> tuple[Value, Value]:
    """The lower and the upper 32 bits of an int64."""
    return cast(x, dtypes.uint32), cast(x >> 32, dtypes.uint32)


def words(seed: Value, block: Value) -> Words:
    """The four uint32 words of a block; ``seed`` and ``block`` are int64."""
    zero = const(0, dtypes.uint32)
    first, second = (const(m, dtypes.uint32) for m in MULTIPLIERS)
    (a, b), c, d = _halves(block), zero, zero
    keys = _halves(seed)
    for _ in range(ROUNDS):
        high, low = binary("mulhi", first, a), first * a
        other_high, other_low = binary("mulhi", second, c), second * c
        a, b, c, d = other_high ^ b ^ keys[0], other_low, high ^ d ^ keys[1], low
        keys = (keys[0] + KEY_STEPS[0], keys[1] + KEY_STEPS[1])
    return a, b, c, d


GROUP: Final = 64  # elements that share blocks
RUN: Final = 16  # blocks of a group


def shared_word(seed: Value, offset: Value, position: Value) -> Value:
    """The word of the element at ``position``, where four share a block."""
    group = binary("udiv", position, const(GROUP))
    place = binary("urem", position, const(RUN))
    found = words(seed, offset + group * RUN + place)
    number = binary("urem", binary("udiv", position, const(RUN)), const(4))
    word = found[3]
    for i in (2, 1, 0):
        word = select(compare("eq", number, const(i)), found[i], word)
    return word


def shared_blocks(count: int) -> int:
    """How many blocks ``count`` elements take, where four share one."""
    return -(-count // GROUP) * RUN


def reference_shared(seed: int, offset: int, count: int) -> np.ndarray[Any, Any]:
    """(count,) words, four of a block, in NumPy."""
    made = reference_words(seed, offset, shared_blocks(count)).reshape(-1, RUN, 4)
    return made.swapaxes(1, 2).reshape(-1)[:count]


def unit(word: Words, dtype: DType) -> Value:
    """A number in [0, 1), of as many bits as ``dtype`` holds without rounding up to 1."""
    if dtype is dtypes.float64:
        high = cast(word[0], dtypes.float64) * 2.0**-32
        return high + cast(word[1] >> 11, dtypes.float64) * 2.0**-53
    bits = UNIFORM_BITS[dtype.name]
    return cast(_upper(word, bits), dtypes.float32) * 2.0**-bits


def at_least(word: Words, p: Value) -> Value:
    """Whether `unit` of float32 is at least ``p``, in [0, 1]: compared as whole numbers, to which
    both are scaled without rounding."""
    bits = UNIFORM_BITS["float32"]
    return _upper(word, bits) >= cast(
        unary("ceil", cast(p, dtypes.float32) * 2.0**bits), dtypes.int32
    )


def _upper(word: Words, bits: int) -> Value:
    """The upper bits of the first word, as a signed integer, which converts faster."""
    return bitcast(word[0] >> (32 - bits), dtypes.int32)


def unit_above_zero(first: Value, second: Value, dtype: DType) -> Value:
    """A number in (0, 1], finest near 0: what a logarithm may be taken of."""
    if dtype is dtypes.float64:
        high = cast(first, dtypes.float64) * 2.0**-32
        return high + (cast(second >> 11, dtypes.float64) * 2.0**-53 + 2.0**-54)
    return cast(first, dtypes.float32) * 2.0**-32 + 2.0**-33


def reference_words(seed: int, offset: int, count: int) -> np.ndarray[Any, Any]:
    """(count, 4) words of consecutive blocks, in NumPy."""
    block = np.arange(offset, offset + count, dtype=np.int64).astype(np.uint64)
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    key = [np.uint64(seed % 2**32), np.uint64(seed // 2**32 % 2**32)]
    counter = (block & mask, block >> shift, np.zeros_like(block), np.zeros_like(block))
    return np.stack(reference_rounds(counter, key), -1).astype(np.uint32)


def reference_rounds(counter: Any, key: Any) -> tuple[Any, Any, Any, Any]:
    """The rounds on words held in uint64 arrays."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = counter
    low_key, high_key = key
    for _ in range(ROUNDS):
        product, other = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (
            (other >> shift) ^ b ^ low_key, other & mask,
            (product >> shift) ^ d ^ high_key, product & mask,
        )  # fmt: skip
        low_key = (low_key + np.uint64(KEY_STEPS[0])) & mask
        high_key = (high_key + np.uint64(KEY_STEPS[1])) & mask
    return a, b, c, d
