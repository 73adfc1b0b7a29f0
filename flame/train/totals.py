"""Sums over the batches of an epoch."""

import math
from dataclasses import asdict, dataclass

import flame
from flame.tensor import Tensor


def figures(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a batch and the number of its hits: float64, (2,), on their device."""
    hits = (flame.argmax(logits.detach(), 1) == labels).sum()
    return flame.stack([loss.detach().double(), hits.double()])


@dataclass
class Totals:
    """Loss, hits and items so far; exact in a checkpoint, so an epoch can be cut anywhere."""

    items: int = 0
    correct: int = 0
    loss_sum: float = 0.0

    def add(self, loss: float, hits: int, count: int) -> None:
        """A batch of ``count`` items: its mean loss, and its hits."""
        self.items += count
        self.correct += hits
        self.loss_sum += loss * count

    @property
    def loss(self) -> float:
        """The mean loss of an item."""
        return self.loss_sum / self.items if self.items else math.nan

    @property
    def accuracy(self) -> float:
        """Hits over items, in 0..1."""
        return self.correct / self.items if self.items else math.nan

    def state_dict(self) -> dict[str, float]:
        """The three sums by name."""
        return asdict(self)
