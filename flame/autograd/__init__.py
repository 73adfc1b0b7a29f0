"""Automatic differentiation: the tape, the backward pass, and ways to shape both."""

from flame.autograd.checkpointing import checkpoint, checkpoint_sequential
from flame.autograd.function import Function, once_differentiable
from flame.autograd.functional import backward, grad, hvp, jacobian
from flame.autograd.mode import (
    detect_anomaly,
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_detect_anomaly,
    set_grad_enabled,
)

__all__ = [
    "Function",
    "backward",
    "checkpoint",
    "checkpoint_sequential",
    "detect_anomaly",
    "enable_grad",
    "grad",
    "hvp",
    "inference_mode",
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "jacobian",
    "no_grad",
    "once_differentiable",
    "set_detect_anomaly",
    "set_grad_enabled",
]
