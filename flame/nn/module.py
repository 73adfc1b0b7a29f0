"""Module: a node in a tree of layers, which owns parameters, buffers and other modules by name.

`_parameters`, `_buffers` and `_modules` are the only places where these live; attribute access
reads and writes them.
A name stands in at most one of the three, and order is order of registration: optimizers and
state_dict rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

import flame
from flame.core.changes import changes
from flame.core.dtypes import DType
from flame.core.errors import ArgumentError, FlameError, StateError, UnsupportedError
from flame.nn import _state
from flame.nn._conversion import converter
from flame.nn._hookable import Hookable
from flame.nn.parameter import Parameter
from flame.ops.op import interpreter
from flame.tensor import Tensor

__all__ = ["Module"]

T = TypeVar("T")


class Module(Hookable):
    """The base of all layers and models.

    A subclass calls `super().__init__()`, assigns parameters and modules as attributes, and
    defines `forward`.
    """

    training: bool
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]
    _modules: dict[str, Module | None]
    _non_persistent_buffers_set: set[str]

    def __init__(self) -> None:
        self.__dict__.update(
            training=True,
            _parameters={},
            _buffers={},
            _modules={},
            _non_persistent_buffers_set=set(),
            _hooks=None,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; every subclass defines it."""
        raise UnsupportedError(f"{self._get_name()}: defines no forward method")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = interpreter()
        if current.recording:
            current.meets(self)
        try:
            if self._hooks is None:
                return self.forward(*args, **kwargs)
            return self._hooks.call(self, args, kwargs)
        except FlameError as error:
            _note_module(error, self)
            raise

    # Attributes

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that the instance's __dict__ and the class lack.
        attributes = self.__dict__
        for kind in ("_parameters", "_modules", "_buffers"):
            members = attributes.get(kind)
            if members is not None and name in members:
                return members[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        changes.count += 1
        if isinstance(value, Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Module):
            self.register_module(name, value)
        else:
            members = _members_with(self, name)
            if members is None:
                object.__setattr__(self, name, value)
            elif value is None or (isinstance(value, Tensor) and members is self._buffers):
                members[name] = value
            else:
                kind = {
                    "_parameters": "a parameter",
                    "_modules": "a module",
                    "_buffers": "a buffer",
                }[next(k for k in _KINDS if self.__dict__[k] is members)]
                raise ArgumentError(
                    f"{self._get_name()}.{name} is {kind}; it takes another one or None, "
                    f"not {type(value).__name__}; delete it first to change its kind"
                )

    def __delattr__(self, name: str) -> None:
        changes.count += 1
        members = _members_with(self, name)
        if members is None:
            object.__delattr__(self, name)
            return
        del members[name]
        self._non_persistent_buffers_set.discard(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._parameters, *self._buffers, *self._modules})

    # Registration

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter; None keeps the name, without a place in the state."""
        if param is not None and not isinstance(param, Parameter):
            raise ArgumentError(
                f"{self._get_name()}.register_parameter({name!r}): takes a Parameter or None, "
                f"got {type(param).__name__}"
            )
        _claim(self, "_parameters", name)[name] = param

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that is no parameter; if `persistent`, it is part of the state_dict."""
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"{self._get_name()}.register_buffer({name!r}): takes a Tensor or None, "
                f"got {type(tensor).__name__}"
            )
        if name not in self.__dict__.get("_buffers", ()) and hasattr(self, name):
            raise ArgumentError(f"{self._get_name()}: has an attribute {name!r} already")
        _claim(self, "_buffers", name)[name] = tensor
        if persistent:
            self._non_persistent_buffers_set.discard(name)
        else:
            self._non_persistent_buffers_set.add(name)

    def register_module(self, name: str, module: Module | None) -> None:
        """Add a child module under `name`."""
        if module is not None and not isinstance(module, Module):
            raise ArgumentError(
                f"{self._get_name()}: child {name!r} must be a Module or None, "
                f"got {type(module).__name__}"
            )
        _claim(self, "_modules", name)[name] = module

    def add_module(self, name: str, module: Module | None) -> None:
        """The same as `register_module`."""
        self.register_module(name, module)

    # Members

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Every module of the tree with its dotted name, this one first (named `prefix`)."""
        seen = set() if memo is None else memo
        if self in seen:
            return
        if remove_duplicate:
            seen.add(self)
        yield prefix, self
        for name, child in self._modules.items():
            if child is not None:
                yield from child.named_modules(seen, _join(prefix, name), remove_duplicate)

    def modules(self, remove_duplicate: bool = True) -> Iterator[Module]:
        """Every module of the tree (once, if `remove_duplicate`), this one first."""
        named = self.named_modules(remove_duplicate=remove_duplicate)
        return (module for _, module in named)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The direct child modules with their names, each once."""
        seen: set[Module] = set()
        for name, child in self._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                yield name, child

    def children(self) -> Iterator[Module]:
        """The direct child modules, each once."""
        return (child for _, child in self.named_children())

    def _named_members(
        self,
        members_of: Callable[[Module], Mapping[str, T | None]],
        prefix: str,
        recurse: bool,
        remove_duplicate: bool,
    ) -> Iterator[tuple[str, T]]:
        seen: set[int] = set()
        modules = (
            self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
            if recurse
            else [(prefix, self)]
        )
        for module_name, module in modules:
            for name, value in members_of(module).items():
                if value is None or id(value) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(value))
                yield _join(module_name, name), value

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Parameters with their dotted names; a shared one appears once, under its first name."""
        return self._named_members(
            lambda module: module._parameters, prefix, recurse, remove_duplicate
        )

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Parameters, each once, in order of registration."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers with their dotted names, persistent or not."""
        return self._named_members(
            lambda module: module._buffers, prefix, recurse, remove_duplicate
        )

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Buffers, each once."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def get_submodule(self, target: str) -> Module:
        """The module with the dotted name `target`; the empty name is this module."""
        module = self
        for name in target.split(".") if target else ():
            child = module._modules.get(name)
            if child is None:
                raise AttributeError(
                    f"{self._get_name()}: no module {target!r}; {module._get_name()} has no child "
                    f"{name!r}"
                )
            module = child
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter with the dotted name `target`."""
        path, _, name = target.rpartition(".")
        parameter = self.get_submodule(path)._parameters.get(name)
        if parameter is None:
            raise AttributeError(f"{self._get_name()}: no parameter {target!r}")
        return parameter

    def get_buffer(self, target: str) -> Tensor:
        """The buffer with the dotted name `target`."""
        path, _, name = target.rpartition(".")
        buffer = self.get_submodule(path)._buffers.get(name)
        if buffer is None:
            raise AttributeError(f"{self._get_name()}: no buffer {target!r}")
        return buffer

    # Modes and gradients

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the whole tree (dropout and batch statistics depend on it)."""
        if not isinstance(mode, bool):
            raise ArgumentError(f"Module.train: mode must be a bool, got {type(mode).__name__}")

        def set_mode() -> None:
            for module in self.modules():
                module.training = mode

        current = interpreter()
        if current.recording:
            current.modes_set.update(map(id, self.modules()))
        current.repeat(set_mode)
        return self

    def eval(self) -> Self:
        """Set evaluation mode for the whole tree."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether gradients are computed for all parameters."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or with `set_to_none=False` set them to zero."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
                continue
            gradient = parameter.grad
            if gradient is None:
                continue
            if not gradient.is_leaf:  # of a backward pass with create_graph=True
                gradient.detach_()
            gradient.requires_grad_(False)
            gradient.zero_()

    # Conversion

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` with every module of the tree, children first."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Replace the data of every parameter, gradient and buffer by `fn` of it;
        identities of parameters stay.
        """
        with flame.no_grad():
            for module in self.modules():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        _convert_parameter(parameter, fn)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = fn(buffer)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device and convert floating-point members to a dtype: to(device),
        to(dtype), to(tensor), ..., to(memory_format=flame.channels_last).
        """
        return self._apply(converter(*args, **kwargs))

    def type(self, dst_type: DType) -> Self:
        """Convert all parameters and buffers, integer ones too."""
        return self._apply(lambda tensor: tensor.to(dst_type))

    def float(self) -> Self:
        """Convert floating-point parameters and buffers to float32."""
        return self.to(flame.float32)

    def double(self) -> Self:
        """Convert floating-point parameters and buffers to float64."""
        return self.to(flame.float64)

    def half(self) -> Self:
        """Convert floating-point parameters and buffers to float16."""
        return self.to(flame.float16)

    def bfloat16(self) -> Self:
        """Convert floating-point parameters and buffers to bfloat16."""
        return self.to(flame.bfloat16)

    def cuda(self, device: Any = None) -> Self:
        """Move parameters and buffers to a GPU, the current one by default."""
        return self.to(device="cuda" if device is None else device)

    def cpu(self) -> Self:
        """Move parameters and buffers to the CPU."""
        return self.to(device="cpu")

    # State

    def state_dict(
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Parameters and persistent buffers by name; they share storage with the module's,
        without history.
        """
        target = {} if destination is None else destination
        return _state.save(self, target, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _state.IncompatibleKeys:
        """Copy values by name into parameters and persistent buffers, converted to their
        dtypes and devices.

        Args:
            state_dict: tensors or NumPy arrays by name.
            strict: whether the names must be exactly those of `state_dict()`.
            assign: put the given tensors in place of the module's own, keeping their dtypes and
                devices.

        Raises:
            StateError: lists everything missing, unexpected (if strict) and of another shape;
                nothing is loaded then.
        """
        return _state.load(self, state_dict, strict=strict, assign=assign)

    # Text

    def _get_name(self) -> str:
        return self.__class__.__name__

    def extra_repr(self) -> str:
        """What stands between the parentheses of `repr`; layers give their sizes."""
        return ""

    def __repr__(self) -> str:
        lines = self.extra_repr().split("\n") if self.extra_repr() else []
        children = [
            f"({name}): " + repr(child).replace("\n", "\n  ")
            for name, child in self._modules.items()
        ]
        if not children and len(lines) <= 1:
            return f"{self._get_name()}({''.join(lines)})"
        return f"{self._get_name()}(\n  " + "\n  ".join(lines + children) + "\n)"


_KINDS = ("_parameters", "_buffers", "_modules")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _members_with(module: Module, name: str) -> dict[str, Any] | None:
    """The dictionary of `module` that holds `name`, if one does."""
    for kind in _KINDS:
        members: dict[str, Any] | None = module.__dict__.get(kind)
        if members is not None and name in members:
            return members
    return None


def _claim(module: Module, kind: str, name: str) -> Any:
    """The dictionary for `kind`, after `name` was checked and taken away from the other kinds."""
    changes.count += 1
    if kind not in module.__dict__:
        raise StateError(
            f"{type(module).__name__}: call super().__init__() before assigning {name!r}"
        )
    if not name or "." in name:
        raise ArgumentError(
            f"{type(module).__name__}: a member's name must be a non-empty string without '.', got "
            f"{name!r}"
        )
    if hasattr(type(module), name):
        raise ArgumentError(
            f"{type(module).__name__}: has a class attribute {name!r}, which would hide a member "
            "of that name; "
            "choose another name"
        )
    for other in _KINDS:
        if other != kind:
            module.__dict__[other].pop(name, None)
    module.__dict__["_non_persistent_buffers_set"].discard(name)
    module.__dict__.pop(name, None)
    return module.__dict__[kind]


def _convert_parameter(parameter: Parameter, fn: Callable[[Tensor], Tensor]) -> None:
    gradient = parameter.grad
    parameter.data = fn(parameter.data)
    if gradient is not None:
        parameter.grad = fn(gradient.detach())


def _note_module(error: FlameError, module: Module) -> None:
    """Say once, in a note under the message, which innermost module an operation failed in."""
    if not getattr(error, "__notes__", None):
        error.add_note(f"in {module._get_name()}({module.extra_repr()})")
