"""Optimizers, one a file, and learning-rate schedules in `lr_scheduler`."""

from flame.optim import lr_scheduler
from flame.optim._adagrad import Adagrad
from flame.optim._adam import Adam
from flame.optim._adamw import AdamW
from flame.optim._lion import Lion
from flame.optim._optimizer import Optimizer
from flame.optim._rmsprop import RMSprop
from flame.optim._sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "Optimizer", "RMSprop", "lr_scheduler"]
