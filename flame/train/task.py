"""What a recipe gives to the trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import flame
from flame.core.dtypes import DType
from flame.data import DataLoader
from flame.nn import Module
from flame.optim import Optimizer
from flame.optim.lr_scheduler import LRScheduler
from flame.tensor import Tensor

# By name, the dtype that autocast computes in; None computes as the parameters are.
PRECISIONS: Final[dict[str, DType | None]] = {
    "float32": None,
    "bf16": flame.bfloat16,
    "fp16": flame.float16,
}


@dataclass(frozen=True)
class Task:
    """A classifier, its data, and how it learns. ``scheduler`` takes one step per batch.

    Both loaders give pairs of images (N, C, H, W) and labels (N,) in memory of the CPU, ready for
    ``model``, which is on ``device``; ``loss`` takes the model's logits (N, classes) and the
    labels. ``pictures`` turns images back into grey values in 0..1 (N, H, W), for the grid of
    predictions. ``precision`` is one of `PRECISIONS`; parameters are float32 whatever it is.
    """

    model: Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    train_batches: DataLoader
    test_batches: DataLoader
    classes: tuple[str, ...]
    pictures: Callable[[Tensor], Tensor]
    device: str = "cpu"
    precision: str = "float32"

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]

    def autocast(self) -> flame.autocast:
        """The region in which the model and the loss are to be computed."""
        dtype = PRECISIONS[self.precision]
        return flame.autocast(self.device_type, dtype, enabled=dtype is not None)
