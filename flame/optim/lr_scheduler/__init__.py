"""Schedules of the learning rate: step one after the optimizer, each epoch or each batch."""

from flame.optim.lr_scheduler._composed import ChainedScheduler, SequentialLR
from flame.optim.lr_scheduler._cosine import CosineAnnealingLR, CosineAnnealingWarmRestarts
from flame.optim.lr_scheduler._exponential import ExponentialLR
from flame.optim.lr_scheduler._lambda import LambdaLR
from flame.optim.lr_scheduler._one_cycle import OneCycleLR
from flame.optim.lr_scheduler._plateau import ReduceLROnPlateau
from flame.optim.lr_scheduler._scheduler import LRScheduler
from flame.optim.lr_scheduler._step import MultiStepLR, StepLR
from flame.optim.lr_scheduler._warmup import ConstantLR, LinearLR

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]
