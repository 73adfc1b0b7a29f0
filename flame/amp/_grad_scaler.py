"""Scaling of losses, so that small gradients do not vanish in float16.

Source: Micikevicius et al., "Mixed Precision Training", 2018, with PyTorch's dynamic scale.

Invariant: no method that a training step calls looks at a number on the device: whether a step is
taken is decided there, by the optimizer's own kernel. So nothing waits for a GPU, and a compiled
step can hold all of it. (`get_scale`, `state_dict` and steps of an optimizer that overrides `step`
do look.)
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterable
from typing import Any

from flame.autograd.mode import no_grad
from flame.core import dtypes
from flame.core.device import check_device
from flame.core.errors import ArgumentError, DeviceError, DTypeError, FlameWarning, StateError
from flame.ops.comparison import where
from flame.ops.creation import full
from flame.ops.foreach import scale_each_
from flame.ops.mathematics import isfinite
from flame.ops.op import interpreter
from flame.ops.pointwise import pointwise
from flame.ops.statistics import any_nonfinite
from flame.optim import Optimizer
from flame.tensor import Tensor

__all__ = ["GradScaler"]


class _Stage(enum.Enum):
    """What was done with an optimizer since the last update of the scale."""

    READY = "ready"
    UNSCALED = "unscaled"
    STEPPED = "stepped"


class _OptimizerState:
    def __init__(self) -> None:
        self.stage = _Stage.READY
        self.found_inf: Tensor | None = None


@pointwise
def inverse_scale(scale: Any) -> Any:
    return 1.0 / scale


@pointwise
def next_scale(
    scale: Any, tracker: Any, found_inf: Any, growth: Any, backoff: Any, interval: Any
) -> Any:
    """(scale, steps since it last changed) after a step."""
    taken = found_inf == 0.0
    grows = taken & (tracker + 1.0 == interval)
    grown = scale * growth
    grown = where(isfinite(grown), grown, scale)
    following = where(taken, where(grows, grown, scale), scale * backoff)
    return following, where(taken & (tracker + 1.0 < interval), tracker + 1.0, 0.0)


class GradScaler:
    """Multiplies the loss by a scale, and takes it out of the gradients before they are used.

    A step whose gradients hold an infinity or NaN is skipped: parameters and the optimizer's state
    stay as they are, bit for bit, and the scale shrinks. After ``growth_interval`` steps without
    one it grows. Semantics, names and state_dict are those of ``torch.amp.GradScaler``::

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # only where gradients are clipped or looked at
        scaler.step(optimizer)
        scaler.update()

    All of it may stand in a function that `flame.compile` compiles.

    Args:
        device: the device of the losses.
        init_scale: the first scale.
        growth_factor: by which the scale grows, above 1.
        backoff_factor: by which it shrinks, below 1.
        growth_interval: so many steps in a row must be taken before it grows.
        enabled: False makes `scale` and `step` do nothing of all that.

    Raises:
        ArgumentError: a factor out of range.

    Warns:
        FlameWarning: the device is not there; the scaler is then disabled, as in PyTorch.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        self._device = str(device)
        self._enabled = bool(enabled)
        if self._enabled and not _is_there(self._device):
            warnings.warn(
                f"GradScaler: there is no device {self._device!r}, so it is disabled; pass "
                "device='cpu' to scale losses on the CPU, or enabled=False",
                FlameWarning,
                stacklevel=2,
            )
            self._enabled = False
        if not self._enabled:
            return
        if not growth_factor > 1.0:
            raise ArgumentError(f"GradScaler: growth_factor must be above 1, got {growth_factor}")
        if not backoff_factor < 1.0:
            raise ArgumentError(f"GradScaler: backoff_factor must be below 1, got {backoff_factor}")
        self._init_scale = float(init_scale)
        self._growth_factor = float(growth_factor)
        self._backoff_factor = float(backoff_factor)
        self._growth_interval = int(growth_interval)
        self._init_growth_tracker = 0
        self._scale: Tensor | None = (
            None  # float32 without dimensions, as the tracker, whose numbers are whole
        )
        self._growth_tracker: Tensor | None = None
        self._states: dict[int, _OptimizerState] = {}  # by id of the optimizer, until `update`

    # --- a step -----------------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """``outputs``, a tensor or an iterable of them, times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            interpreter().repeat(self._begin, undo=self._states.clear)
            assert self._scale is not None
            return outputs * self._scale.to(outputs.device)
        if isinstance(outputs, Iterable):
            scaled = [self.scale(each) for each in outputs]
            return scaled if not isinstance(outputs, tuple) else tuple(scaled)
        raise DTypeError(
            f"GradScaler.scale takes a tensor or an iterable of them, got {type(outputs).__name__}"
        )

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of the optimizer's parameters by the scale, in place.

        `step` does it where it was not done; call it to clip the gradients before. At most once
        for each optimizer and `update`.

        Raises:
            StateError: it was done already, or after `step`, or nothing was scaled.
            ArgumentError: a gradient is float16: keep parameters in float32.
        """
        if not self._enabled:
            return
        scale = self._known_scale("unscale_")
        state = self._state_of(optimizer)
        if state.stage is _Stage.UNSCALED:
            raise StateError(
                "unscale_() has already been called on this optimizer since the last update()"
            )
        if state.stage is _Stage.STEPPED:
            raise StateError("unscale_() is being called after step()")
        with no_grad():
            state.found_inf = _unscale(optimizer, scale)
        state.stage = _Stage.UNSCALED

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)``, without effect where a gradient is not finite.

        The optimizers of `flame.optim` decide that on the device. For one that overrides `step`,
        the host waits and looks. Returns what the optimizer's step returns, None where that was not
        called.

        Raises:
            StateError: it was called for this optimizer since the last `update`, nothing was
                scaled, or no parameter has a gradient.
            ArgumentError: a closure, whose gradients would not be scaled.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if args or "closure" in kwargs:
            raise ArgumentError(
                "GradScaler.step takes no closure; compute the gradients before, of scaled losses"
            )
        self._known_scale("step")
        state = self._state_of(optimizer)
        if state.stage is _Stage.STEPPED:
            raise StateError("step() has already been called since the last update()")
        if state.stage is _Stage.READY:
            self.unscale_(optimizer)
        found_inf = state.found_inf
        if found_inf is None:
            raise StateError("GradScaler.step: no parameter of this optimizer has a gradient")
        state.stage = _Stage.STEPPED
        if type(optimizer).step is not Optimizer.step:
            return None if found_inf.item() else optimizer.step(**kwargs)
        optimizer.found_inf = found_inf
        try:
            return optimizer.step(**kwargs)
        finally:
            del optimizer.found_inf

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adapt the scale to whether the steps since the last call were taken.

        new_scale: the scale to go on with instead, a number or a float32 tensor of one element.

        Raises:
            StateError: no step was taken or gradient unscaled since the last call.
            DTypeError, ShapeError: ``new_scale`` is of another kind.
        """
        if not self._enabled:
            return
        scale = self._known_scale("update")
        with no_grad():
            if new_scale is not None:
                _set(scale, new_scale)
            else:
                self._adapt(scale)
        self._states.clear()

    def _adapt(self, scale: Tensor) -> None:
        tracker = self._growth_tracker
        assert tracker is not None
        found = [s.found_inf for s in self._states.values() if s.found_inf is not None]
        if not found:
            raise StateError("No inf checks were recorded prior to update.")
        total = found[0]
        for each in found[1:]:
            total = total + each
        numbers = interpreter().repeat(
            lambda: (self._growth_factor, self._backoff_factor, float(self._growth_interval))
        )
        next_scale(scale, tracker, total, *numbers, out=(scale, tracker))

    def _begin(self) -> None:
        """The first scale, once something is scaled."""
        if self._scale is None:
            device = self._device
            self._scale = full((), self._init_scale, dtype=dtypes.float32, device=device)
            self._growth_tracker = full(
                (), self._init_growth_tracker, dtype=dtypes.float32, device=device
            )

    def _known_scale(self, name: str) -> Tensor:
        if self._scale is None:
            raise StateError(
                f"Attempted {name} but _scale is None. This may indicate your script did not use "
                "scaler.scale(loss or outputs) earlier in the iteration."
            )
        return self._scale

    def _state_of(self, optimizer: Optimizer) -> _OptimizerState:
        return self._states.setdefault(id(optimizer), _OptimizerState())

    # --- settings and state -----------------------------------------------------------------------

    def is_enabled(self) -> bool:
        """Whether the scaler scales."""
        return self._enabled

    def get_scale(self) -> float:
        """The scale; 1.0 if disabled. Waits for the device."""
        if not self._enabled:
            return 1.0
        return self._init_scale if self._scale is None else float(self._scale.item())

    def get_growth_factor(self) -> float:
        """By which the scale grows."""
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set by which the scale grows."""
        self._growth_factor = float(new_factor)

    def get_backoff_factor(self) -> float:
        """By which the scale shrinks."""
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set by which the scale shrinks."""
        self._backoff_factor = float(new_factor)

    def get_growth_interval(self) -> int:
        """How many steps in a row must be taken before the scale grows."""
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set how many steps in a row must be taken before the scale grows."""
        self._growth_interval = int(new_interval)

    def _get_growth_tracker(self) -> int:
        if not self._enabled:
            return 0
        tracker = self._growth_tracker
        return self._init_growth_tracker if tracker is None else int(tracker.item())

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, in PyTorch's layout; {} if disabled. Waits for the device."""
        if not self._enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._get_growth_tracker(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of this class or of PyTorch's. A disabled scaler ignores it.

        Raises:
            StateError: the state is empty, as that of a disabled scaler, or lacks a key.
        """
        if not self._enabled:
            return
        if not state_dict:
            raise StateError(
                "The source state dict is empty, possibly because it was saved from a disabled "
                "instance of GradScaler."
            )
        wanted = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        missing = [name for name in wanted if name not in state_dict]
        if missing:
            raise StateError(f"GradScaler.load_state_dict: missing {', '.join(missing)}")
        self._init_scale = float(state_dict["scale"])
        self._growth_factor = float(state_dict["growth_factor"])
        self._backoff_factor = float(state_dict["backoff_factor"])
        self._growth_interval = int(state_dict["growth_interval"])
        self._init_growth_tracker = int(state_dict["_growth_tracker"])
        if self._scale is not None and self._growth_tracker is not None:
            with no_grad():
                self._scale.fill_(self._init_scale)
                self._growth_tracker.fill_(self._init_growth_tracker)


def _is_there(device: str) -> bool:
    try:
        check_device(device)
    except DeviceError:
        return False
    return True


def _unscale(optimizer: Optimizer, scale: Tensor) -> Tensor | None:
    """Divide all gradients by the scale; returns 1 where one was not finite, or else 0."""
    gradients = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not gradients:
        return None
    if any(gradient.dtype is dtypes.float16 for gradient in gradients):
        raise ArgumentError(
            "Attempting to unscale FP16 gradients. Keep parameters in float32: autocast casts them "
            "where that is safe"
        )
    found = any_nonfinite(gradients)
    scale_each_(gradients, inverse_scale(scale))
    result: Tensor = found.to(dtypes.float32)
    return result


def _set(scale: Tensor, new_scale: Any) -> None:
    if isinstance(new_scale, Tensor):
        if new_scale.dtype is not dtypes.float32 or new_scale.requires_grad:
            raise DTypeError(
                "GradScaler.update: new_scale must be a float or a float32 tensor that does not "
                f"require grad, got {new_scale.type!r}"
            )
        if new_scale.numel() != 1:
            raise ArgumentError(
                f"GradScaler.update: new_scale must have one element, got {new_scale.shape}"
            )
        scale.copy_(new_scale.reshape(()))
    elif isinstance(new_scale, (int, float)):
        scale.fill_(float(new_scale))
    else:
        raise DTypeError(f"GradScaler.update: new_scale cannot be a {type(new_scale).__name__}")
