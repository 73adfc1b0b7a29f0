"""Tensor: making, describing, reading, converting, copying, and trading memory with others."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from typing import Any

import numpy as np
import pytest

import flame
from flame.core import dtypes
from flame.core.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    GradientError,
    ShapeError,
)

# --- making ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (3, flame.int64, ()), (3.5, flame.float32, ()), (True, flame.bool, ()),
        ([1, 2], flame.int64, (2,)), ([1, 2.5], flame.float32, (2,)),
        ([True, False], flame.bool, (2,)),
        ([[1, 2], [3, 4]], flame.int64, (2, 2)), ((1.0, 2.0), flame.float32, (2,)),
        ([], flame.float32, (0,)), ([[], []], flame.float32, (2, 0)), (range(3), flame.int64, (3,)),
        ([True, 2], flame.int64, (2,)), (np.float64(2), flame.float64, ()),
        (np.float32(2), flame.float32, ()), ([np.float64(2)], flame.float64, (1,)),
        (np.ones((2, 3)), flame.float64, (2, 3)), (np.arange(3, dtype=np.int8), flame.int8, (3,)),
        ([np.int32(3)], flame.int32, (1,)), ([np.ones(2)], flame.float64, (1, 2)),
        (np.array(True), flame.bool, ()),
    ],
)  # fmt: skip
def test_inferred_dtypes(data: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    made = flame.tensor(data)
    assert made.dtype is dtype
    assert made.shape == shape
    assert made.tolist() == np.asarray(data).tolist()


def test_the_default_dtype() -> None:
    assert flame.get_default_dtype() is flame.float32
    flame.set_default_dtype(flame.float64)
    try:
        assert flame.tensor([1.5]).dtype is flame.float64
        assert flame.zeros(2).dtype is flame.float64
        assert flame.arange(0.0, 1.0, 0.5).dtype is flame.float64
        assert (flame.tensor([1, 2]) / 2).dtype is flame.float64
        assert (flame.tensor([1, 2]) * 1.5).dtype is flame.float64
        assert flame.Tensor([1]).dtype is flame.float64
    finally:
        flame.set_default_dtype(flame.float32)
    with pytest.raises(DTypeError):
        flame.set_default_dtype(flame.int64)


def test_given_dtypes() -> None:
    third = 1 / 3
    assert flame.tensor([third], dtype=flame.float64).item() == third  # not by way of float32
    assert flame.tensor([1.9, -1.9], dtype=flame.int64).tolist() == [1, -1]
    assert flame.tensor([0.0, 0.5], dtype=flame.bool).tolist() == [False, True]
    assert flame.tensor([1e6], dtype=flame.float16).item() == math.inf
    assert flame.tensor([-1], dtype=flame.uint8).item() == 255
    made = flame.tensor([1.0, 2.5], dtype=flame.bfloat16)
    assert made.dtype is flame.bfloat16
    assert made.tolist() == [1.0, 2.5]
    assert flame.tensor(made).dtype is flame.bfloat16


def test_tensor_copies() -> None:
    array = np.ones(3)
    made = flame.tensor(array)
    array[0] = 7
    assert made.tolist() == [1, 1, 1]
    other = flame.tensor(made)
    other[0] = 9
    assert made.tolist() == [1, 1, 1]


def test_tensors_inside_sequences() -> None:
    made = flame.tensor([flame.tensor(1.5), flame.tensor(2.5)])
    assert made.tolist() == [1.5, 2.5]
    assert flame.tensor([[flame.tensor(1), 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ShapeError):
        flame.tensor([flame.ones(2), flame.ones(3)])


def test_requires_grad_at_creation() -> None:
    assert flame.tensor([1.0], requires_grad=True).requires_grad
    assert flame.zeros(2, requires_grad=True).is_leaf
    with pytest.raises(GradientError):
        flame.tensor([1], requires_grad=True)


def test_from_numpy_shares_memory() -> None:
    array = np.arange(6.0).reshape(2, 3)
    made = flame.from_numpy(array)
    array[0, 0] = 9
    assert made[0, 0].item() == 9
    made[1, 2] = -1
    assert array[1, 2] == -1
    assert np.shares_memory(made.numpy(), array)
    view = flame.from_numpy(array.T[1:])
    assert view.stride() == (1, 3)
    view.zero_()
    assert array.tolist() == [[9, 0, 0], [3, 0, 0]]
    odd = flame.from_numpy(array[::-1])  # negative strides are copied
    assert odd.tolist() == array[::-1].tolist()
    assert flame.from_numpy(np.broadcast_to(np.float32(1), (2, 2))).sum().item() == 4


def test_memory_outlives_its_owner() -> None:
    made = flame.from_numpy(np.arange(1000.0)).numpy()
    flame.rand(1000)
    assert made[999] == 999
    array = (flame.arange(1000.0) * 2).numpy()
    flame.rand(1000)
    assert array[999] == 1998


def test_as_tensor_and_asarray() -> None:
    array = np.ones(3)
    assert np.shares_memory(flame.as_tensor(array).numpy(), array)
    made = flame.as_tensor(array, dtype=flame.float32)
    assert made.dtype is flame.float32
    tensor = flame.ones(2)
    assert flame.as_tensor(tensor) is tensor
    assert flame.asarray(tensor) is tensor
    assert flame.asarray(tensor, copy=True).data_ptr() != tensor.data_ptr()
    assert np.shares_memory(flame.asarray(array, copy=False).numpy(), array)
    with pytest.raises(ArgumentError):
        flame.asarray([1, 2], copy=False)
    with pytest.raises(ArgumentError):
        flame.asarray(array, dtype=flame.float32, copy=False)


def test_other_buffers() -> None:
    assert flame.frombuffer(bytearray(b"\x01\x02\x03"), dtype=flame.uint8).tolist() == [1, 2, 3]
    assert flame.frombuffer(b"\x01\x00\x02\x00", dtype=flame.int16, offset=2).tolist() == [2]
    with pytest.raises(ArgumentError):
        flame.frombuffer(b"abc", dtype=flame.float32)
    assert flame.scalar_tensor(3).dtype is flame.float32


def test_the_class_makes_tensors() -> None:
    assert flame.Tensor([1, 2]).dtype is flame.float32
    assert flame.Tensor(2, 3).shape == (2, 3)
    assert flame.Tensor().shape == (0,)


def test_subclasses() -> None:
    class Mine(flame.Tensor):
        pass

    made = Mine([1.0, 2.0])
    assert isinstance(made, Mine)
    assert (made * 2).tolist() == [2, 4]
    assert isinstance(copy.deepcopy(made), Mine)


# --- DLPack ---------------------------------------------------------------------------------------


def test_dlpack_with_numpy() -> None:
    tensor = flame.arange(4.0)
    array = np.from_dlpack(tensor)
    array[0] = 9
    assert tensor[0].item() == 9
    back = flame.from_dlpack(array)
    back[1] = 8
    assert tensor.tolist() == [9, 8, 2, 3]
    assert tensor.__dlpack_device__() == (1, 0)
    with pytest.raises(GradientError):
        np.from_dlpack(flame.ones(1, requires_grad=True))
    with pytest.raises(DTypeError):
        flame.from_dlpack([1, 2])


def test_dlpack_with_torch() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.arange(6.0).reshape(2, 3).t()
    ours = flame.from_dlpack(theirs)
    assert ours.shape == (3, 2)
    ours[0, 0] = 5
    assert theirs[0, 0].item() == 5
    back = torch.from_dlpack(ours)
    back[1, 1] = 7
    assert ours[1, 1].item() == 7
    for name in ("float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        made = flame.from_dlpack(torch.ones(2, dtype=getattr(torch, name)))
        assert made.dtype is getattr(flame, name)
        assert torch.from_dlpack(made).dtype is getattr(torch, name)
    assert flame.from_dlpack(torch.zeros(0, 3)).shape == (0, 3)


# --- description ----------------------------------------------------------------------------------


def test_properties() -> None:
    x = flame.zeros(2, 3, 4)
    assert x.shape == x.size() == (2, 3, 4)
    assert x.size(1) == x.size(-2) == 3
    assert x.ndim == x.dim() == 3
    assert x.numel() == x.nelement() == flame.numel(x) == 24
    assert x.itemsize == x.element_size() == 4
    assert x.nbytes == 96
    assert x.stride() == (12, 4, 1)
    assert x.stride(0) == 12
    assert x[1].storage_offset() == 12
    assert x.device == "cpu"
    assert x.device == flame.device("cpu")
    assert x.device.type == "cpu"
    assert x.is_cpu
    assert not x.is_cuda
    assert x.is_contiguous()
    assert not x.transpose(0, 1).is_contiguous()
    assert x.is_floating_point()
    assert flame.is_floating_point(x)
    assert not x.is_complex()
    assert x.is_signed()
    assert not flame.zeros(1, dtype=flame.uint8).is_signed()
    assert x.T.shape == (4, 3, 2)
    assert x.mT.shape == (2, 4, 3)
    assert flame.is_tensor(x)
    assert not flame.is_tensor([1])
    with pytest.raises(IndexError):
        x.size(3)


def test_printing() -> None:
    assert repr(flame.tensor([1, 2])) == "tensor([1, 2])"
    assert repr(flame.tensor(3.5)) == "tensor(3.5)" or "3.5" in repr(flame.tensor(3.5))
    assert "dtype=flame.float64" in repr(flame.zeros(1, dtype=flame.float64))
    assert "requires_grad=True" in repr(flame.zeros(1, requires_grad=True))
    assert "grad_fn=<mul" in repr(flame.zeros(1, requires_grad=True) * 2)
    assert "size=(0, 3)" in repr(flame.zeros(0, 3))
    assert "bfloat16" in repr(flame.ones(1, dtype=flame.bfloat16))
    assert "..." in repr(flame.zeros(10_000))
    assert f"{flame.tensor(2.5):.2f}" == "2.50"
    assert f"{flame.tensor([1])}" == "tensor([1])"
    assert str(flame.float32) == "flame.float32"


def test_devices() -> None:
    assert repr(flame.device("cpu")) == "device(type='cpu')"
    assert flame.device("cuda", 1) == "cuda:1"
    assert flame.device("cuda:1").index == 1
    assert flame.zeros(1, device=flame.device("cpu")).device == "cpu"
    with pytest.raises(DeviceError):
        flame.device("tpu")
    for make in (lambda: flame.zeros(1, device="tpu"), lambda: flame.zeros(1).to("mars")):
        with pytest.raises(DeviceError):
            make()


# --- values ---------------------------------------------------------------------------------------


def test_reading_values() -> None:
    assert flame.tensor([[2.5]]).item() == 2.5
    assert type(flame.tensor(3).item()) is int
    assert type(flame.tensor(True).item()) is bool
    assert type(flame.tensor(1.5, dtype=flame.bfloat16).item()) is float
    assert flame.tensor([[1, 2], [3, 4]]).T.tolist() == [[1, 3], [2, 4]]
    assert flame.tensor(4).tolist() == 4
    assert bool(flame.tensor([0.0])) is False
    assert int(flame.tensor(2.9)) == 2
    assert float(flame.tensor(2)) == 2.0
    assert [10, 20, 30][flame.tensor(1)] == 20
    assert list(range(5))[: flame.tensor(2)] == [0, 1]
    assert len(flame.zeros(3, 2)) == 3
    assert [t.tolist() for t in flame.tensor([[1, 2], [3, 4]])] == [[1, 2], [3, 4]]
    first, second = flame.tensor([5, 6])
    assert (first.item(), second.item()) == (5, 6)
    assert 3 in flame.tensor([1, 3])
    assert 4 not in flame.tensor([1, 3])
    assert math.sqrt(flame.tensor(4.0)) == 2
    assert hash(first) != hash(second)
    assert {first: 1}[first] == 1


def test_reading_what_cannot_be_read() -> None:
    for read in (
        lambda: flame.zeros(2).item(), lambda: bool(flame.zeros(2)), lambda: bool(flame.zeros(0)),
        lambda: int(flame.zeros(2)), lambda: float(flame.zeros(0)), lambda: len(flame.tensor(1)),
        lambda: list(flame.tensor(1)),
    ):  # fmt: skip
        with pytest.raises(ShapeError):
            read()
    with pytest.raises(DTypeError):
        operator.index(flame.tensor(1.0))
    with pytest.raises(GradientError, match="detach"):
        flame.ones(1, requires_grad=True).numpy()
    assert flame.ones(1, requires_grad=True).numpy(force=True).tolist() == [1]
    assert flame.ones(2, requires_grad=True).tolist() == [1, 1]
    assert flame.ones(1, requires_grad=True).item() == 1


# --- NumPy ----------------------------------------------------------------------------------------


def test_mixing_with_numpy() -> None:
    x = flame.tensor([1.0, 2.0])
    assert np.asarray(x).dtype == np.float32
    assert np.shares_memory(np.asarray(x), x.numpy())
    assert np.array(x, dtype=np.float64).tolist() == [1, 2]
    assert np.sum(np.asarray(x)) == 3
    for number in (np.float32(2), np.float64(2), np.int64(2)):
        for made in (x * number, number * x, x + number, number - x):
            assert isinstance(made, flame.Tensor)
            assert made.dtype is flame.float32
    assert (np.float32(2) ** x).tolist() == [2, 4]
    assert (x > np.float32(1)).tolist() == [False, True]


def test_numpy_arrays_as_operands() -> None:
    x = flame.tensor([1.0, 2.0], dtype=flame.float64)
    array = np.array([10.0, 20.0])
    for made in (x + array, array + x, array * x, x - array, array - x, array / x):
        assert isinstance(made, flame.Tensor)
    assert (array - x).tolist() == [9, 18]
    assert (array > x).tolist() == [True, True]
    assert (x @ array).item() == 50


# --- copies ---------------------------------------------------------------------------------------


def test_copies() -> None:
    x = flame.tensor([1.0, 2.0], requires_grad=True)
    x.grad = flame.ones(2)
    deep = copy.deepcopy(x)
    assert deep.requires_grad
    assert deep.is_leaf
    assert deep.data_ptr() != x.data_ptr()
    assert deep.grad is not None
    assert deep.grad.data_ptr() != x.grad.data_ptr()
    shared = copy.deepcopy([x, x])
    assert shared[0] is shared[1]
    shallow = copy.copy(x)
    assert shallow.tolist() == x.tolist()
    with pytest.raises(GradientError):
        copy.deepcopy(x * 2)


@pytest.mark.parametrize("dtype", dtypes.ALL)
def test_pickle(dtype: Any) -> None:
    x = flame.arange(6).reshape(2, 3).T.to(dtype)
    back = pickle.loads(pickle.dumps(x))
    assert back.dtype is dtype
    assert back.tolist() == x.tolist()
    if dtype.kind == "f":
        assert pickle.loads(pickle.dumps(x.requires_grad_())).requires_grad


def test_pickle_keeps_one_dtype_object() -> None:
    assert pickle.loads(pickle.dumps(flame.float32)) is flame.float32
    assert copy.deepcopy(flame.bool) is flame.bool


# --- conversion -----------------------------------------------------------------------------------


def test_to() -> None:
    x = flame.ones(2)
    assert x.to(flame.float32) is x
    assert x.to("cpu") is x
    assert x.to(flame.device("cpu"), flame.float64).dtype is flame.float64
    assert x.to(x) is x
    assert x.to(flame.zeros(1, dtype=flame.int8)).dtype is flame.int8
    assert x.to(flame.float32, copy=True) is not x
    assert x.to("cpu", flame.float32, False, True) is not x
    assert x.to(dtype=flame.float16, device="cpu", non_blocking=True).dtype is flame.float16
    assert x.cpu() is x
    with pytest.raises(DTypeError):
        x.to(3.5)  # an int is the number of a GPU
    with pytest.raises(ArgumentError):
        x.to(color="red")
    with pytest.raises(DTypeError):
        x.to(dtype="float32")
    with pytest.raises(DeviceError):
        x.cuda()


def test_conversions_by_name() -> None:
    x = flame.tensor([0.0, 1.7])
    for name, dtype in {
        "double": flame.float64, "float": flame.float32, "half": flame.float16,
        "bfloat16": flame.bfloat16, "long": flame.int64, "int": flame.int32,
        "short": flame.int16, "char": flame.int8, "byte": flame.uint8, "bool": flame.bool,
    }.items():  # fmt: skip
        assert getattr(x, name)().dtype is dtype
    assert x.bool().tolist() == [False, True]
    assert x.long().tolist() == [0, 1]
    assert x.type_as(flame.tensor(1)).dtype is flame.int64
    y = x.clone().requires_grad_()
    y.double().sum().backward()
    assert y.grad is not None
    assert y.grad.dtype is flame.float32


def test_aliases_of_dtypes() -> None:
    assert flame.float is flame.float32
    assert flame.double is flame.float64
    assert flame.half is flame.float16
    assert flame.long is flame.int64
    assert flame.int is flame.int32
    assert flame.short is flame.int16


def test_memory_formats() -> None:
    x = flame.arange(120.0).reshape(2, 3, 4, 5)
    last = x.contiguous(memory_format=flame.channels_last)
    assert last.stride() == (60, 1, 15, 3)
    assert last.is_contiguous(memory_format=flame.channels_last)
    assert not last.is_contiguous()
    assert (last == x).all()
    assert last.contiguous(memory_format=flame.channels_last) is last
    assert x.to(memory_format=flame.channels_last).stride() == last.stride()
    assert last.clone().stride() == last.stride()
    assert last.clone(memory_format=flame.contiguous_format).is_contiguous()
    with pytest.raises(ShapeError):
        flame.zeros(2).contiguous(memory_format=flame.channels_last)


def test_data() -> None:
    x = flame.ones(2, requires_grad=True)
    x.data[0] = 5
    assert x.tolist() == [5, 1]
    assert not x.data.requires_grad
    x.data = flame.zeros(3)
    assert x.shape == (3,)
    assert x.requires_grad
    with pytest.raises(DTypeError):
        x.data = [1, 2]  # type: ignore[assignment]  # on purpose


def test_new_tensors() -> None:
    x = flame.ones(2, 3, dtype=flame.float16)
    assert x.new_zeros(4).dtype is flame.float16
    assert x.new_zeros(2, 1).shape == x.new_zeros((2, 1)).shape == (2, 1)
    assert x.new_ones(2).tolist() == [1, 1]
    assert x.new_full((2,), 7, dtype=flame.int64).tolist() == [7, 7]
    assert x.new_tensor([1, 2]).dtype is flame.float16
    assert x.new_empty(0, 5).shape == (0, 5)
    assert flame.empty_strided((2, 3), (1, 2)).stride() == (1, 2)
    assert flame.empty_permuted((2, 3, 4), (0, 2, 1)).stride() == (12, 1, 3)
    y = flame.arange(4)
    assert y.resize_(2, 2).tolist() == [[0, 1], [2, 3]]
    assert y.resize_(6)[:4].tolist() == [0, 1, 2, 3]


# --- promotion ------------------------------------------------------------------------------------


def test_promotion_as_pytorch() -> None:
    torch = pytest.importorskip("torch")
    for a in dtypes.ALL:
        for b in dtypes.ALL:
            ta, tb = getattr(torch, a.name), getattr(torch, b.name)
            assert flame.promote_types(a, b).name == str(torch.promote_types(ta, tb))[6:]
            assert flame.can_cast(a, b) == torch.can_cast(ta, tb), (a, b)
            for shapes in (((2,), (2,)), ((), (2,)), ((2,), ())):
                x, y = flame.zeros(shapes[0], dtype=a), flame.zeros(shapes[1], dtype=b)
                theirs = torch.result_type(
                    torch.zeros(shapes[0], dtype=ta), torch.zeros(shapes[1], dtype=tb)
                )
                ours = flame.result_type(x, y)
                assert ours.name == str(theirs)[6:]
                assert (x + y).dtype is ours
        for number in (True, 2, 2.5):
            theirs = torch.result_type(torch.zeros(2, dtype=ta), number)
            assert flame.result_type(flame.zeros(2, dtype=a), number).name == str(theirs)[6:]


def test_limits_of_dtypes() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float64", "float32", "float16", "bfloat16"):
        ours, theirs = flame.finfo(getattr(flame, name)), torch.finfo(getattr(torch, name))
        for field in ("bits", "min", "max", "eps", "tiny", "smallest_normal", "dtype"):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)
        assert math.isclose(ours.resolution, theirs.resolution, rel_tol=0.01)
    for name in ("int64", "int32", "int16", "int8", "uint8"):
        whole, expected = flame.iinfo(getattr(flame, name)), torch.iinfo(getattr(torch, name))
        for field in ("bits", "min", "max", "dtype"):
            assert getattr(whole, field) == getattr(expected, field)
    with pytest.raises(DTypeError):
        flame.finfo(flame.int64)
    with pytest.raises(DTypeError):
        flame.iinfo(flame.float32)


def test_array_namespace() -> None:
    space = flame.ones(2).__array_namespace__()
    for name in (
        "abs", "add", "all", "any", "arange", "argmax", "asarray", "broadcast_to", "concat",
        "cos", "empty", "equal", "exp", "eye", "finfo", "float32", "full", "isnan", "iinfo",
        "linspace", "matmul", "max", "mean", "meshgrid", "ones", "prod", "reshape", "result_type",
        "sort", "sqrt", "squeeze", "stack", "sum", "take_along_dim", "tensordot", "where", "zeros",
    ):  # fmt: skip
        assert hasattr(space, name), name


def test_in_place_from_memory_that_overlaps() -> None:
    """The operand is copied first, and its copy may be laid out in another way than it was."""
    for start in (0, 1):
        whole = flame.arange(24.0).reshape(4, 6)
        expected = whole.numpy().copy()
        part, view = whole[1:3, ::2], expected[1:3, ::2]
        part[:1] = part[start : start + 1]
        view[:1] = view[start : start + 1].copy()
        part[:1] += 100
        view[:1] += 100
        part.t().copy_(part.t().flip(0))
        view.T[...] = view.T[::-1].copy()
        whole[:, :4].add_(whole[:, 2:])
        expected[:, :4] += expected[:, 2:].copy()
        assert whole.tolist() == expected.tolist()
