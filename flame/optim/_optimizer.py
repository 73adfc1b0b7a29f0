"""The base of all optimizers: parameter groups, state by parameter, and the loop of one step.

Invariants:
- An optimizer's whole arithmetic is one pure elementwise function per variant, traced into one
  kernel; it holds no Python branch on a hyperparameter, for those are run-time scalars. What a
  hyperparameter switches (momentum or none, amsgrad or not) selects another function.
- Scalars that depend on the number of steps are computed in double precision on the host, from the
  group's values read anew at each step, so a scheduler or the user may change them between steps.
- A step that the device may skip is `flame.optim._conditional`.
- State is created on the first step that sees a gradient, and keyed by the parameter itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeAlias

from flame.core.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from flame.ops.op import interpreter
from flame.optim import _state_dict
from flame.optim._conditional import Counted, conditional
from flame.optim._recording import recorded
from flame.optim._tensors import Tensor, enable_grad, no_grad, zeros_like

__all__ = ["Optimizer", "Parameters", "Scalar", "Update"]

Scalar: TypeAlias = float | Tensor
Parameters: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Update(NamedTuple):
    """How one step changes one parameter.

    `function(parameter, gradient, *buffers, *scalars)` returns the new parameter and buffers.
    """

    function: Callable[..., Any]
    buffers: tuple[str, ...]


class Updates(NamedTuple):
    """Kernel calls of a step that have their scalars in common.

    They are `function(*inputs[i], *scalars, out=outputs[i])` for each parameter.
    """

    function: Any  # a `Pointwise`
    scalars: tuple[Scalar, ...]
    inputs: list[tuple[Tensor, ...]]
    outputs: list[tuple[Tensor, ...]]


class Optimizer:
    """Base class of optimizers.

    A subclass names its update by `_update` and its scalars by `_scalars`; one that needs something
    else overrides `step`, and may use `param_groups`, `state` and `defaults` as it likes.

    Args:
        params: leaf tensors, or (name, tensor) pairs, or dicts with the key "params" and options of
            their own.
        defaults: the options of groups that do not give them.

    Raises:
        ArgumentError: no parameters, a parameter twice, a parameter that is no leaf, a value out of
            range.
        DTypeError: something that is no floating-point tensor.
    """

    _counts_steps: ClassVar[bool] = True
    _buffers: ClassVar[tuple[str, ...]] = ()  # the state that has the shape of its parameter

    # Set by a GradScaler while it calls `step`: a tensor without dimensions. Where it is not 0 the
    # step changes nothing; it is not looked at by the host.
    found_inf: Tensor | None = None

    def __init__(self, params: Parameters, defaults: dict[str, Any]) -> None:
        self.defaults = dict(defaults)
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self._counts: dict[Tensor, Tensor] = {}  # of steps, where only the device knows them
        if isinstance(params, (Tensor, dict, str)):
            raise DTypeError(
                f"{self._name}: params must be a list of tensors or of groups, got one "
                f"{type(params).__name__}; "
                "put it into a list"
            )
        self._refuse_unordered(params)
        entries: list[Any] = list(params)
        if not entries:
            raise ArgumentError(
                f"{self._name}: got no parameters; is `module.parameters()` empty, or was its "
                "iterator used before?"
            )
        if any(isinstance(entry, dict) for entry in entries):
            for entry in entries:
                self.add_param_group(entry)
        else:
            self.add_param_group({"params": entries})

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults for the options that it does not give.

        The dict itself becomes the group, as in PyTorch, so it must not be shared between
        optimizers.
        """
        if not isinstance(param_group, dict):
            raise DTypeError(
                f"{self._name}: a parameter group must be a dict, got "
                f"{type(param_group).__name__}; "
                "do not mix groups and single tensors in one list"
            )
        if "params" not in param_group:
            raise ArgumentError(
                f'{self._name}: a parameter group needs the key "params", got the keys '
                f"{sorted(param_group)}"
            )
        names, tensors = self._named_tensors(param_group["params"])
        self._check_tensors(tensors)
        group = {**self.defaults, **param_group}
        if names is not None:
            group["param_names"] = names
        self._check_group(group)
        param_group.update(group, params=tensors)
        self.param_groups.append(param_group)

    def _named_tensors(self, params: Any) -> tuple[list[str] | None, list[Tensor]]:
        self._refuse_unordered(params)
        entries: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if not entries:
            raise ArgumentError(f"{self._name}: got an empty parameter group")
        named = [isinstance(entry, tuple) and len(entry) == 2 for entry in entries]
        if any(named) != all(named):
            raise ArgumentError(f"{self._name}: give a name with every parameter or with none")
        if all(named):
            return [entry[0] for entry in entries], [entry[1] for entry in entries]
        return None, entries

    def _refuse_unordered(self, params: Any) -> None:
        if isinstance(params, (set, frozenset)):
            raise DTypeError(
                f"{self._name}: a set of parameters has another order in every run, and state is "
                "saved by order; "
                "give a list"
            )

    def _check_tensors(self, tensors: list[Tensor]) -> None:
        known = {id(tensor) for group in self.param_groups for tensor in group["params"]}
        for position, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise DTypeError(
                    f"{self._name}: parameter {position} must be a tensor, got "
                    f"{type(tensor).__name__}"
                )
            if tensor.dtype.kind != "f":
                raise DTypeError(
                    f"{self._name}: parameter {position} has dtype {tensor.dtype.name}; "
                    "only floating-point tensors can be optimized"
                )
            if not tensor.is_leaf:
                raise ArgumentError(
                    f"{self._name}: parameter {position} of shape {tuple(tensor.shape)} is no "
                    "leaf: it was computed "
                    "from other tensors; optimize those, or use .detach().requires_grad_()"
                )
            if id(tensor) in known:
                raise ArgumentError(
                    f"{self._name}: parameter {position} of shape {tuple(tensor.shape)} was "
                    "already given; "
                    "each parameter may appear once, in one group"
                )
            known.add(id(tensor))

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse values out of range; each optimizer says which."""

    # One step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or with `set_to_none=False` fill them with zeros."""
        with no_grad():
            for parameter in self._parameters():
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad = zeros_like(parameter.grad)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; it runs with gradients enabled, once,
                before the update.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        with no_grad():
            if self.found_inf is not None or self._counts:
                updates = conditional(self, self.found_inf)
            else:
                updates = recorded(self) if interpreter().recording else self._prepare()
            for function, scalars, inputs, outputs in updates:
                function.foreach(inputs, *scalars, out=outputs)
        return loss

    def _prepare(self) -> list[Updates]:
        """The host's work of one step: creates missing state, counts, computes the scalars.

        What is left is calling the kernels, in any order. In a compiled step the scalars are the
        only part that differs from step to step; see `flame.optim._recording`.
        """
        found: list[Updates] = []
        for group in self.param_groups:
            update = self._update(group)
            by_step: dict[int, Updates] = {}  # parameters without a gradient fall behind
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.type is not parameter.type:
                    self._check_gradient(parameter)
                state = self.state[parameter]
                step = self._advance(parameter, state, update, group)
                updates = by_step.get(step)
                if updates is None:
                    scalars = self._scalars(group, step)
                    updates = by_step[step] = Updates(update.function, scalars, [], [])
                    found.append(updates)
                buffers = [state[name] for name in update.buffers]
                updates.inputs.append((parameter, gradient, *buffers))
                updates.outputs.append((parameter, *buffers))
        return found

    def _check_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.shape != parameter.shape or gradient.dtype is not parameter.dtype:
            raise ShapeError(
                f"{self._name}: a parameter of shape {tuple(parameter.shape)} and dtype "
                f"{parameter.dtype.name} has a gradient of shape {tuple(gradient.shape)} and dtype "
                f"{gradient.dtype.name}; assign gradients of the parameter's own shape and dtype"
            )

    def _advance(
        self, parameter: Tensor, state: dict[str, Any], update: Update, group: dict[str, Any]
    ) -> int:
        """Create missing buffers and count the step: returns 1 on a parameter's first step.

        An optimizer that keeps no count gets 1 on the first step and 2 on every later one.
        """
        created = False
        if self._counts_steps:
            step: int = state.get("step", 0) + 1
            state["step"] = step
        for name in update.buffers:
            if state.get(name) is None:
                state[name] = self._initial(name, parameter, group)
                created = True
        if self._counts_steps:
            return step
        return 1 if created else 2

    def _begin(self, parameter: Tensor, update: Update, group: dict[str, Any]) -> int | Tensor:
        """Create missing buffers; returns the count of steps before this one.

        An optimizer that keeps no count gets 0 before the first step, and more before later ones.
        """
        state = self.state[parameter]
        missing = [name for name in update.buffers if state.get(name) is None]
        for name in missing:
            state[name] = self._initial(name, parameter, group)
        if parameter in self._counts:
            return self._counts[parameter]
        if not self._counts_steps:
            return 0 if missing else 1
        count: int = state.get("step", 0)
        return count

    def _update(self, group: dict[str, Any]) -> Update:
        """The update that the group's options select."""
        raise UnsupportedError(
            f"{self._name}: an optimizer defines `_update` and `_scalars`, or overrides `step`"
        )

    def _scalars(self, group: dict[str, Any], step: int) -> tuple[Scalar, ...]:
        """The scalars that the update takes after its buffers, in the function's order."""
        return ()

    def _counted(self, group: dict[str, Any]) -> Counted | None:
        """How the device computes the first scalars, if they depend on the number of steps."""
        return None

    def _initial(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The first value of a buffer."""
        return zeros_like(parameter.detach())

    # State

    def state_dict(self) -> dict[str, Any]:
        """State and options in PyTorch's layout.

        It is `{"state": {number: {...}}, "param_groups": [{..., "params": [number, ...]}]}`, where
        parameters are numbered in the order of the groups. The tensors are the optimizer's own, not
        copies; "step" is a float32 tensor without dimensions.
        """
        return _state_dict.save(self.state, self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this optimizer or of PyTorch's, of tensors or of NumPy arrays.

        Tensors are copied, and cast to the dtype and device of their parameter. Nothing changes if
        anything does not fit.

        Raises:
            StateError: groups, parameters or shapes that differ from this optimizer's.
        """
        state, groups = _state_dict.load(
            self._name, state_dict, self.param_groups, self.defaults, self._buffers
        )
        for group in groups:
            self._check_group(group)
        self.state.clear()
        self._counts.clear()
        self.state.update(state)
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.clear()
            group.update(loaded)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def __repr__(self) -> str:
        lines = []
        for position, group in enumerate(self.param_groups):
            numbers = sum(parameter.numel() for parameter in group["params"])
            lines.append(f"  group {position}: {len(group['params'])} tensors, {numbers} numbers")
            lines += [
                f"    {key}: {group[key]}"
                for key in sorted(group)
                if key not in ("params", "param_names") and group[key] is not None
            ]
        return "\n".join([f"{self._name} (", *lines, ")"])
