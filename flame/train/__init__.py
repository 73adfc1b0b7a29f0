"""The training loop, and the folder that a run leaves."""

from flame.train.folder import RunFolder
from flame.train.task import Task
from flame.train.trainer import Observer, Trainer, evaluate

__all__ = ["Observer", "RunFolder", "Task", "Trainer", "evaluate"]
