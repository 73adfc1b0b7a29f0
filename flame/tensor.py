"""Tensor: the user's handle on typed, strided memory.

Invariants: a tensor is (storage, pointer, type); every method that computes goes through an op, so
it is recorded; ``node`` is where its gradient goes, and a leaf has none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from flame.autograd import engine
from flame.autograd.mode import mode, no_grad, set_grad_enabled
from flame.core import dtypes
from flame.core.changes import changes
from flame.core.device import Device, check_device, device_index
from flame.core.dtypes import DType
from flame.core.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    GradientError,
    ShapeError,
)
from flame.core.handle import Handle
from flame.core.types import Shape, TensorType, tensor_type
from flame.ops.op import interpreter
from flame.ops.transfer import move
from flame.runtime.storage import Storage

if TYPE_CHECKING:
    from flame.methods import Methods  # a stub: what `flame.api` attaches at import
else:

    class Methods:
        """At run time the methods are attached to Tensor itself."""


_handle_ids = itertools.count()


class RemovableHandle:
    """Removes a hook again; also a context manager."""

    def __init__(self, hooks: Any, key: Any) -> None:
        self._hooks, self._key = hooks, key
        changes.tensors += 1

    def remove(self) -> None:
        changes.tensors += 1
        if isinstance(self._hooks, dict):
            self._hooks.pop(self._key, None)
        elif self._key in self._hooks:
            self._hooks.remove(self._key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Keeper:
    """The hook that puts a gradient into ``grad``; it does not keep the tensor alive."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)

    def __call__(self, gradient: Tensor) -> None:
        tensor = self.tensor()
        if tensor is not None:
            held = tensor.grad
            tensor.grad = gradient if held is None else held + gradient


class Tensor(Handle, Methods):
    """A multi-dimensional array on a device, with automatic differentiation.

    Make one by `flame.tensor`, `flame.from_numpy`, `flame.zeros` and the like. Methods are
    PyTorch's by name, arguments and meaning.
    """

    # Defaults stand on the class, so that making a tensor sets only what differs.
    storage: Storage
    pointer: int
    type: TensorType
    node: Any = None
    output_index: int = 0
    tracked: bool = False
    _grad: Tensor | None = None
    base: Tensor | None = None
    base_node: Any = None
    hooks: dict[int, Callable[[Any], Any]] | None = None
    after_hooks: dict[int, Callable[[Any], Any]] | None = None
    name: str | None = None

    __array_ufunc__ = None  # NumPy arrays leave mixed operators to the tensor
    __array_priority__ = 1000

    def __init__(self, *data: Any, dtype: DType | None = None) -> None:
        """From data (in the default dtype), or uninitialised from sizes; see `flame.tensor`."""
        from flame.creation import tensor
        from flame.ops.creation import empty

        dtype = dtypes.get_default_dtype() if dtype is None else dtype
        sizes = all(isinstance(d, int) and not isinstance(d, bool) for d in data)
        if sizes and data:
            made = empty(data, dtype=dtype)
        elif len(data) > 1:
            raise DTypeError(f"Tensor takes sizes, or one sequence of numbers, got {data!r}")
        else:
            made = tensor(data[0] if data and data[0] is not None else (), dtype=dtype)
        self.storage, self.pointer, self.type = made.storage, made.pointer, made.type

    @classmethod
    def wrap(cls, storage: Storage, pointer: int, type_: TensorType) -> Self:
        """A tensor over memory that exists."""
        made = cls.__new__(cls)
        made.storage = storage
        made.pointer = pointer
        made.type = type_
        return made

    def alias(self, node: Any = None, index: int = 0) -> Tensor:
        """The same memory without history, or with the given one."""
        made = Tensor.wrap(self.storage, self.pointer, self.type)
        if node is not None:
            made.node, made.output_index, made.tracked = node, index, True
        return made

    # --- description ------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def device(self) -> Device:
        return Device(self.type.device)

    @property
    def ndim(self) -> int:
        return self.type.ndim

    def dim(self) -> int:
        return self.type.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the size of one dimension."""
        return self.type.shape if dim is None else self.type.shape[_dim(self, dim)]

    def numel(self) -> int:
        return self.type.numel

    def nelement(self) -> int:
        return self.type.numel

    def element_size(self) -> int:
        return self.type.dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self.type.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.type.numel * self.type.dtype.itemsize

    def stride(self, dim: int | None = None) -> Any:
        """Strides in elements, or that of one dimension."""
        return self.type.strides if dim is None else self.type.strides[_dim(self, dim)]

    def storage_offset(self) -> int:
        return (self.pointer - self.storage.pointer) // self.type.dtype.itemsize

    def data_ptr(self) -> int:
        return self.pointer

    def is_contiguous(self, memory_format: Any = None) -> bool:
        """Whether the elements lie row by row, or as ``memory_format`` says."""
        from flame.ops.conversion import format_order, in_order

        if memory_format is None:
            return self.type.contiguous
        if {"channels_last": 4, "channels_last_3d": 5}.get(memory_format, self.ndim) != self.ndim:
            return False
        order = format_order("is_contiguous", memory_format, self.ndim)
        return self.type.contiguous if order is None else in_order(self.type, order)

    def is_floating_point(self) -> bool:
        return self.type.dtype.kind == "f"

    def is_complex(self) -> bool:
        return False

    def is_signed(self) -> bool:
        return self.type.dtype.is_signed

    def get_device(self) -> int:
        """The number of the GPU, -1 on the CPU."""
        return -1 if self.type.device == "cpu" else device_index(self.type.device)

    @property
    def is_cuda(self) -> bool:
        return self.type.device != "cpu"

    @property
    def is_cpu(self) -> bool:
        return self.type.device == "cpu"

    @property
    def _version(self) -> int:
        return self.storage.version

    def __len__(self) -> int:
        if not self.type.shape:
            raise ShapeError("len() of a 0-d tensor; it has no dimensions")
        return self.type.shape[0]

    # --- values -----------------------------------------------------------------------------------

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """The values as a NumPy array over the same memory (zero-copy).

        Raises GradientError on a tensor that requires grad; use ``.detach()``. Raises DeviceError
        on one of a GPU; use ``.cpu()``. force: do both where they are needed.
        """
        if force:
            return self._values()
        if self.requires_grad:
            raise GradientError(
                "numpy() on a tensor that requires grad would lose its history; "
                "use .detach().numpy()"
            )
        return self._array()

    def _array(self) -> np.ndarray[Any, Any]:
        type_ = self.type
        if mode.recorder is not None:
            mode.recorder.meets_value(self)
        if type_.device != "cpu":
            raise DeviceError(
                f"numpy() on a tensor on {type_.device}: NumPy sees the memory of the CPU alone; "
                "use .cpu().numpy()"
            )
        return self.storage.as_numpy(
            type_.dtype.numpy, type_.shape, type_.strides, self.storage_offset()
        )

    def _values(self) -> np.ndarray[Any, Any]:
        """The values as an array: over the same memory, or copied from a GPU."""
        if self.type.device == "cpu":
            return self._array()
        if mode.recorder is not None:
            mode.recorder.meets_value(self)
        with no_grad():
            return self.detach().cpu()._array()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def item(self) -> Any:
        """The only element as a Python number. Raises ShapeError where there is not exactly one."""
        if self.type.numel != 1:
            raise ShapeError(f"item() needs one element, the tensor has shape {self.shape}")
        found = self._values().reshape(())
        if self.type.dtype is dtypes.bfloat16:
            return float(found)
        return found.item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers."""
        array = self._values()
        if self.type.dtype is dtypes.bfloat16:
            array = array.astype(np.float32)
        return array.tolist()

    def __bool__(self) -> bool:
        if self.type.numel != 1:
            raise ShapeError(
                f"the truth of a tensor of shape {self.shape} is ambiguous; use .any() or .all()"
            )
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        if self.type.dtype.kind == "f":
            raise DTypeError(f"a {self.dtype.name} tensor cannot be an index; convert it to int64")
        return int(self.item())

    __hash__ = object.__hash__  # tensors are keys by identity; `==` compares elements

    def __iter__(self) -> Iterator[Tensor]:
        if not self.type.shape:
            raise ShapeError("iteration over a 0-d tensor; it has no dimensions")
        return (self[i] for i in range(self.type.shape[0]))

    def __contains__(self, element: Any) -> bool:
        return bool((self == element).any().item())

    def __repr__(self) -> str:
        from flame.printing import text_of

        return text_of(self)

    def __format__(self, spec: str) -> str:
        if spec and self.type.numel == 1 and not self.type.ndim:
            return format(self.item(), spec)
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise GradientError(
                "deepcopy of a tensor with history; only leaves can be copied. Use .detach() first"
            )
        with no_grad():
            made = type(self).wrap(*_parts(self.detach().clone()))
        made.requires_grad = self.requires_grad
        if self.grad is not None:
            made.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        values = np.ascontiguousarray(self._values())
        tracked = self.requires_grad and self.is_leaf
        arguments = (type(self), values, self.type.dtype, tracked, self.type.device)
        return _unpickle, arguments

    def __dlpack__(self, **options: Any) -> Any:
        """Share the memory by the DLPack protocol."""
        if self.requires_grad:
            raise GradientError("DLPack cannot carry gradients; use .detach() first")
        if self.type.dtype is dtypes.bfloat16:
            raise DTypeError("bfloat16 cannot be shared through DLPack here; convert it first")
        if self.type.device != "cpu":
            raise DeviceError(
                f"DLPack here shares memory of the CPU alone, this tensor is on "
                f"{self.type.device}; use .cpu()"
            )
        return self._array().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0) if self.type.device == "cpu" else (2, device_index(self.type.device))

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        import flame

        return flame

    # --- autograd ---------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow to this tensor."""
        if self.base is not None:
            self.current_node()
        return self.tracked

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether gradients are accumulated into ``grad``. Leaves of floating dtype only."""
        if requires_grad and self.type.dtype.kind != "f":
            raise GradientError(
                f"only floating tensors can require grad, this one is {self.dtype.name}"
            )
        if not requires_grad and self.current_node() is not None:
            raise GradientError(
                "requires_grad of a computed tensor cannot be turned off; use .detach()"
            )
        if self.tracked != bool(requires_grad):
            changes.tensors += 1
            if mode.recorder is not None:
                mode.recorder.meets_flag(self)
        self.tracked = bool(requires_grad)
        return self

    @property
    def grad(self) -> Tensor | None:
        """The accumulated gradient; it can be read, changed and replaced.

        Assigning raises DTypeError for what is no tensor, GradientError for another shape or dtype.
        """
        if mode.recorder is not None:
            mode.recorder.meets_gradient(self, read=True)
        return self._grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            _check_gradient(self, value)
        if mode.recorder is not None:
            mode.recorder.meets_gradient(self, read=False)
        self._grad = value

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    @property
    def is_leaf(self) -> bool:
        return self.current_node() is None

    @property
    def grad_fn(self) -> Any:
        return self.current_node()

    @property
    def data(self) -> Tensor:
        """The same memory outside of autograd. Assigning replaces the memory."""
        return self.alias()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise DTypeError(f"data must be a tensor, got {type(value).__name__}")
        if mode.recorder is not None:
            mode.recorder.meets_replacement(self)
        changes.tensors += 1
        self.storage, self.pointer, self.type = _parts(value)

    def detach(self) -> Tensor:
        """The same memory without history."""
        return self.alias()

    def detach_(self) -> Self:
        """Forget the history of this tensor."""
        self.node, self.tracked, self.base, self.base_node = None, False, None, None
        return self

    def current_node(self) -> Any:
        """Where the gradient goes. A view whose base was changed in place follows the base."""
        base = self.base
        if base is not None and base.node is not self.base_node:
            from flame.ops.shapes import as_strided

            offset = (self.pointer - base.pointer) // self.type.dtype.itemsize
            with set_grad_enabled(True):
                fresh = as_strided(
                    base, shape=self.type.shape, strides=self.type.strides, offset=offset
                )
            self.node, self.output_index = fresh.node, fresh.output_index
            self.tracked, self.base_node = fresh.tracked, base.node
        return self.node

    def rebase(self, node: Any, position: int, inputs: tuple[Any, ...]) -> None:
        """Take on the history of an in-place operation; ``node`` None: the values were replaced."""
        base = self.base
        if base is None:
            self.node, self.output_index, self.tracked = node, position, node is not None
            return
        from flame.eager import SliceNode

        if base.tracked and base.current_node() is None:
            raise GradientError(
                "in-place operation on a view of a leaf that requires grad; do it under "
                "flame.no_grad(), or on a clone of the leaf"
            )
        edges = [] if node is None else list(node.edges)
        selves = tuple(i for i, x in enumerate(inputs) if x is self)
        for i in selves:
            edges[i] = None
        inner = SliceNode(node, selves, base, self, [engine.edge_of(base), *edges])
        base.node, base.output_index, base.tracked = inner, 0, True
        self.base_node = None
        self.current_node()

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | Tensor | None = None,
    ) -> None:
        """Accumulate the gradients of this tensor into the leaves it was computed from.

        gradient: of this tensor's shape; not needed for a scalar. create_graph: the gradients can
        be differentiated again. Raises GradientError where no gradient can flow.
        """
        if isinstance(inputs, Tensor):
            inputs = [inputs]
        engine.backward([self], [gradient], retain_graph, create_graph, inputs)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``hook(grad)`` when the gradient is known; what it returns replaces the gradient."""
        if not self.requires_grad:
            raise GradientError("register_hook on a tensor that does not require grad")
        _check_callable(hook)
        node = self.current_node()
        if node is None:
            if self.hooks is None:
                self.hooks = {}
            return _add_hook(self.hooks, hook)
        if node.hooks is None:
            node.hooks = []
        entry = (self.output_index, hook)
        keepers = sum(isinstance(h, _Keeper) for _, h in node.hooks)
        node.hooks.insert(len(node.hooks) - keepers, entry)  # what is kept is what hooks made of it
        return RemovableHandle(node.hooks, entry)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``hook(self)`` after a backward pass has accumulated ``grad``. Leaves only."""
        if not self.is_leaf or not self.requires_grad:
            raise GradientError("post-accumulate hooks are for leaves that require grad")
        _check_callable(hook)
        if self.after_hooks is None:
            self.after_hooks = {}
        return _add_hook(self.after_hooks, hook)

    def retain_grad(self) -> None:
        """Keep the gradient of a computed tensor in ``grad`` too."""
        if not self.requires_grad:
            raise GradientError("retain_grad on a tensor that does not require grad")
        node = self.current_node()
        if node is not None and not self.retains_grad:
            node.hooks = [*(node.hooks or ()), (self.output_index, _Keeper(self))]

    @property
    def retains_grad(self) -> bool:
        """Whether a computed tensor keeps its gradient."""
        node = self.current_node()
        hooks = () if node is None else node.hooks or ()
        return any(isinstance(h, _Keeper) and h.tensor() is self for _, h in hooks)

    # --- devices ----------------------------------------------------------------------------------

    def cpu(self, memory_format: Any = None) -> Tensor:
        """On the CPU; itself where it is there."""
        return self.to("cpu", memory_format=memory_format)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Tensor:
        """On a GPU (the current one by default). Raises DeviceError where there is none."""
        place = check_device("cuda" if device is None else device)
        return move(self, place, non_blocking=non_blocking)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Convert to a dtype, a device, or both; ``self`` where nothing changes (unless ``copy``).

        Forms: ``to(dtype)``, ``to(device, dtype)``, ``to(other)``, each with ``non_blocking``,
        ``copy`` and ``memory_format``. ``non_blocking``: from pinned memory (`pin_memory`) to a GPU
        without waiting.
        """
        from flame.ops.conversion import clone, contiguous, convert

        dtype, device, copy, memory_format, non_blocking = _conversion(args, kwargs)
        place = self.type.device if device is None else check_device(device)
        check_dtype(dtype)
        made = self if dtype is None else convert(self, dtype=dtype)
        made = move(made, place, non_blocking=non_blocking)
        if copy and made is self:
            return clone(self, memory_format=memory_format)
        if memory_format is not None and memory_format != "preserve_format":
            return contiguous(made, memory_format)
        return made


def _conversion(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool, Any, bool]:
    """(dtype, device, copy, memory_format, non_blocking) of a call of `Tensor.to`."""
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    copy, memory_format = kwargs.pop("copy", False), kwargs.pop("memory_format", None)
    non_blocking = bool(kwargs.pop("non_blocking", False))
    other = kwargs.pop("other", None)
    if kwargs:
        raise ArgumentError(f"to() has no argument {next(iter(kwargs))!r}")
    flags = [a for a in args if isinstance(a, bool)]
    non_blocking = flags[0] if flags else non_blocking
    copy = flags[1] if len(flags) > 1 else copy
    for argument in (*args, *(() if other is None else (other,))):
        if isinstance(argument, DType):
            dtype = argument
        elif isinstance(argument, Tensor):
            dtype, device = argument.dtype, argument.device
        elif isinstance(argument, str) or argument.__class__ is int:
            device = argument
        elif not isinstance(argument, bool) and argument is not None:
            raise DTypeError(f"to() takes a dtype, a device or a tensor, got {argument!r}")
    return dtype, device, bool(copy), memory_format, non_blocking


def _check_gradient(tensor: Tensor, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(f"a gradient is a tensor or None, got {type(value).__name__}")
    if value.type.shape != tensor.type.shape or value.type.dtype is not tensor.type.dtype:
        raise GradientError(
            f"a gradient of type {value.type!r} does not fit a tensor of type {tensor.type!r}; "
            "their shapes and dtypes must be equal"
        )
    if value.type.device != tensor.type.device:
        raise DeviceError(
            f"a gradient on {value.type.device} does not fit a tensor on {tensor.type.device}; "
            "move it there"
        )


def _parts(tensor: Tensor) -> tuple[Storage, int, TensorType]:
    return tensor.storage, tensor.pointer, tensor.type


def _dim(tensor: Tensor, dim: int) -> int:
    from flame.ops.shapes import wrap_dim

    return wrap_dim("size", dim, tensor.ndim)


def _check_callable(hook: Any) -> None:
    if not callable(hook):
        raise DTypeError(f"a hook must be callable, got {type(hook).__name__}")


def _add_hook(hooks: dict[int, Any], hook: Any) -> RemovableHandle:
    key = next(_handle_ids)
    hooks[key] = hook
    return RemovableHandle(hooks, key)


def _unpickle(
    cls: type[Tensor],
    values: np.ndarray[Any, Any],
    dtype: DType,
    requires_grad: bool,
    device: str = "cpu",
) -> Tensor:
    made = cls.wrap(*_parts(move(from_array(values.copy(), dtype), device)))
    made.tracked = requires_grad
    return made


def from_array(array: np.ndarray[Any, Any], dtype: DType | None = None) -> Tensor:
    """A tensor over a NumPy array's memory."""
    made = _over_array(array, dtype)
    interpreter().made(made)
    return made


def _over_array(array: np.ndarray[Any, Any], dtype: DType | None) -> Tensor:
    found = dtype or dtypes.from_numpy(array.dtype)
    size = array.dtype.itemsize
    if any(s < 0 or s % size for s in array.strides) or not array.flags.aligned:
        array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    type_ = tensor_type(found, array.shape, tuple(s // size for s in array.strides))
    if not array.size:
        storage = Storage.allocate(0)
        return Tensor.wrap(storage, storage.pointer, tensor_type(found, array.shape))
    storage = Storage.borrow(array.ctypes.data, type_.span * size, array)
    return Tensor.wrap(storage, storage.pointer, type_)


def check_dtype(dtype: Any) -> None:
    """Raise DTypeError unless ``dtype`` is one, or None."""
    if dtype is not None and not isinstance(dtype, DType):
        raise DTypeError(f"a dtype such as flame.float32 is needed, got {dtype!r}")
