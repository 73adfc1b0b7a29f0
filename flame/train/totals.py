"""Sums over the batches of an epoch."""

import math
from dataclasses import asdict, dataclass

import flame
from flame.tensor import Tensor


@dataclass
class Totals:
    """Loss, hits and items so far; exact in a checkpoint, so an epoch can be cut anywhere."""

    items: int = 0
    correct: int = 0
    loss_sum: float = 0.0

    def add(self, loss: float, logits: Tensor, labels: Tensor) -> None:
        """``loss``: the mean over the batch; logits (N, classes), labels (N,)."""
        count = labels.shape[0]
        self.items += count
        self.correct += int((flame.argmax(logits.detach(), 1) == labels).sum().item())
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
