"""What a recipe gives to the trainer."""

from collections.abc import Callable
from dataclasses import dataclass

from flame.data import DataLoader
from flame.nn import Module
from flame.optim import Optimizer
from flame.optim.lr_scheduler import LRScheduler
from flame.tensor import Tensor


@dataclass(frozen=True)
class Task:
    """A classifier, its data, and how it learns. ``scheduler`` takes one step per batch.

    Both loaders give pairs of images (N, C, H, W) and labels (N,), ready for ``model``; ``loss``
    takes the model's logits (N, classes) and the labels. ``pictures`` turns images back into grey
    values in 0..1 (N, H, W), for the grid of predictions.
    """

    model: Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    train_batches: DataLoader
    test_batches: DataLoader
    classes: tuple[str, ...]
    pictures: Callable[[Tensor], Tensor]
