"""Random numbers for data, by position instead of by history.

Invariant: what is drawn for a batch depends on (seed, purpose, epoch, number of the batch) alone.
So it is the same however many workers there are, whichever of them makes the batch, and after a
resume in the middle of an epoch.

The generator is NumPy's Philox (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011):
its key and counter are set directly, so that streams are independent by construction.
"""

from __future__ import annotations

import enum

import numpy as np

from flame.ops.generator import Generator, default_generator

__all__ = ["Purpose", "random_generator", "seed_of"]

_WORD = 2**64


class Purpose(enum.IntEnum):
    """Keeps streams of the same seed apart."""

    ORDER = 1
    BATCH = 2
    SPLIT = 3
    SAMPLE = 4
    WEIGHTED = 5


def seed_of(generator: Generator | None) -> int:
    """The seed of a `flame.Generator`, or of `flame.manual_seed` where there is none.

    Only its seed is read and nothing is drawn from it: a loader that is made or not made changes no
    other random number of the program, and a resumed run draws what an uninterrupted one does.
    """
    return (default_generator if generator is None else generator).initial_seed()


def random_generator(
    seed: int, purpose: Purpose, epoch: int = 0, number: int = 0
) -> np.random.Generator:
    """The random numbers of one (seed, purpose, epoch, number)."""
    key = [seed % _WORD, int(purpose)]
    # The generator itself counts in the first word, so no two streams can meet.
    counter = [0, 0, number % _WORD, epoch % _WORD]
    return np.random.Generator(
        np.random.Philox(
            key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
        )
    )
