"""TextFile: a text as sequences of tokens, each with the tokens that follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from flame.core.errors import ArgumentError, DataError, IndexRangeError
from flame.data._tensors import Tensor, as_tensor
from flame.data.dataset import Dataset

__all__ = ["TextFile"]


class TextFile(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is (tokens, targets), both int64 (block_size,); targets are the next tokens.

    Args:
        path: a text file.
        block_size: tokens in a sequence.
        level: "byte" takes each of the file's bytes as a token, of 256; "character" each character
            of UTF-8 text, of those that occur in the file, in sorted order.
        stride: tokens from the start of one sequence to the start of the next; by default
            block_size, so that each token is a target once; 1 gives every sequence.

    Raises:
        DataError: a file that is missing, no UTF-8 text, or too short for one sequence.
    """

    def __init__(
        self,
        path: str | Path,
        block_size: int,
        level: Literal["byte", "character"] = "byte",
        *,
        stride: int | None = None,
    ) -> None:
        if level not in ("byte", "character"):
            raise ArgumentError(f'TextFile: level must be "byte" or "character", got {level!r}')
        for name, value in (("block_size", block_size), ("stride", stride)):
            if value is not None and value < 1:
                raise ArgumentError(f"TextFile: {name} must be at least 1, got {value}")
        self.path = Path(path)
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        self.level = level
        self.vocabulary: tuple[str, ...] = ()
        self.tokens = self._read()
        self._check_length()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexRangeError(f"TextFile: index {index} of {len(self)} sequences")
        start = index % len(self) * self.stride
        sequence = self.tokens[start : start + self.block_size + 1].astype(np.int64)
        return as_tensor(sequence[:-1]), as_tensor(sequence[1:])

    def __len__(self) -> int:
        return (len(self.tokens) - self.block_size - 1) // self.stride + 1

    def get_batch(self, indices: Sequence[int], generator: np.random.Generator) -> Any:
        """Tokens and targets, both (N, block_size), cut out at once."""
        if type(self).__getitem__ is not TextFile.__getitem__:
            return super().get_batch(indices, generator)
        starts = np.asarray(indices, dtype=np.int64)
        if starts.size and not (-len(self) <= starts.min() and starts.max() < len(self)):
            raise IndexRangeError(f"TextFile: indices {list(indices)} of {len(self)} sequences")
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, self.block_size + 1)
        sequences = windows[starts % len(self) * self.stride].astype(np.int64)
        return as_tensor(sequences[:, :-1]), as_tensor(sequences[:, 1:])

    @property
    def vocabulary_size(self) -> int:
        """How many different tokens there can be."""
        return 256 if self.level == "byte" else len(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int64.

        Raises:
            DataError: a character that does not occur in the file.
        """
        if self.level == "byte":
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        numbers = {character: number for number, character in enumerate(self.vocabulary)}
        unknown = sorted(set(text) - numbers.keys())
        if unknown:
            raise DataError(f"TextFile: {self.path} has no {', '.join(map(repr, unknown))}")
        return np.array([numbers[character] for character in text], dtype=np.int64)

    def decode(self, tokens: Any) -> str:
        """The text of tokens, a list, an array or a tensor (N,); broken UTF-8 shows as �."""
        numbers = [
            int(token) for token in (tokens.tolist() if hasattr(tokens, "tolist") else tokens)
        ]
        if not all(0 <= number < self.vocabulary_size for number in numbers):
            raise IndexRangeError(f"TextFile: tokens must lie in [0, {self.vocabulary_size})")
        if self.level == "byte":
            return bytes(numbers).decode(errors="replace")
        return "".join(self.vocabulary[number] for number in numbers)

    def split(self, fraction: float) -> tuple[Self, Self]:
        """The first part of the text and the rest, which share no token.

        Args:
            fraction: of the tokens that the first part gets, in (0, 1).
        """
        if not 0.0 < fraction < 1.0:
            raise ArgumentError(f"TextFile.split: fraction must lie in (0, 1), got {fraction}")
        cut = int(len(self.tokens) * fraction)
        return self._part(self.tokens[:cut]), self._part(self.tokens[cut:])

    def _part(self, tokens: np.ndarray) -> Self:
        part = type(self).__new__(type(self))
        vars(part).update(vars(self), tokens=tokens)
        part._check_length()
        return part

    def _read(self) -> np.ndarray:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"TextFile: {self.path} cannot be read: {error.strerror}") from error
        if self.level == "byte":
            return np.frombuffer(content, dtype=np.uint8)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"TextFile: {self.path} is no UTF-8 text at byte {error.start}; "
                'convert it, or take level="byte"'
            ) from error
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        found, tokens = np.unique(points, return_inverse=True)
        self.vocabulary = tuple(chr(point) for point in found)
        return tokens.astype(np.uint16 if len(found) <= 2**16 else np.int32)

    def _check_length(self) -> None:
        if len(self.tokens) <= self.block_size:
            raise DataError(
                f"TextFile: {self.path} gives {len(self.tokens)} tokens, a sequence of "
                f"{self.block_size} "
                f"and its targets need {self.block_size + 1}; take a longer text or a smaller "
                "block_size"
            )

    def __repr__(self) -> str:
        return (
            f"TextFile({str(self.path)!r}: {len(self.tokens)} tokens of {self.vocabulary_size}, "
            f"{len(self)} sequences of {self.block_size})"
        )
