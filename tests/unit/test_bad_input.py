"""Bad input of every kind raises a FlameError that says what is wrong; nothing crashes.

Each case is a call and a word that its message must have. Random calls follow: whatever they are
given, they return or raise a FlameError.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flame
import flame.nn.functional as F
from flame import nn
from flame.core.errors import (
    DTypeError,
    FlameError,
    GradientError,
    IndexRangeError,
    OutOfMemoryError,
    ShapeError,
)

NAN = float("nan")


def x(*shape: int, dtype: Any = flame.float32) -> flame.Tensor:
    return flame.ones(*shape, dtype=dtype)


def i(*values: int) -> flame.Tensor:
    return flame.tensor(values, dtype=flame.int64)


class Uninitialised(flame.Tensor):
    def __init__(self) -> None:
        pass


SHAPES: dict[str, tuple[Callable[[], Any], str]] = {
    "broadcast": (lambda: x(2, 3) + x(4), "(4,)"),
    "comparison": (lambda: x(2) == x(3), "(3,)"),
    "where": (lambda: flame.where(x(2) > 0, x(3), x(2)), "(3,)"),
    "matmul": (lambda: x(2, 3) @ x(2, 3), "(2, 3)"),
    "matmul 0-d": (lambda: x() @ x(3), "dimension"),
    "matmul batch": (lambda: x(2, 3, 4) @ x(3, 4, 5), "broadcast"),
    "mm of 3-d": (lambda: flame.mm(x(2, 3, 4), x(4, 2)), "(2, 3, 4)"),
    "dot": (lambda: flame.dot(x(2), x(3)), "shapes"),
    "linear": (lambda: F.linear(x(2, 3), x(4, 5)), "(4, 5)"),
    "reshape": (lambda: x(2, 3).reshape(4), "(4,)"),
    "reshape unknown": (lambda: x(2, 3).reshape(-1, 4), "(2, 3)"),
    "reshape two unknown": (lambda: x(2, 3).reshape(-1, -1), "-1"),
    "reshape of nothing": (lambda: x(0).reshape(-1, 0), "(0,)"),
    "view": (lambda: x(2, 3).t().view(6), "reshape"),
    "expand": (lambda: x(2, 3).expand(4, 3), "(4, 3)"),
    "expand to fewer": (lambda: x(2, 3).expand(3), "(2, 3)"),
    "permute": (lambda: x(2, 3).permute(0), "(2, 3)"),
    "permute twice": (lambda: x(2, 3).permute(0, 0), "twice"),
    "cat": (lambda: flame.cat([x(2, 3), x(2, 4)]), "(2, 4)"),
    "cat of nothing": (lambda: flame.cat([]), "cat"),
    "stack": (lambda: flame.stack([x(2), x(3)]), "(3,)"),
    "stack of nothing": (lambda: flame.stack([]), "stack"),
    "split sizes": (lambda: x(5).split([2, 2]), "5"),
    "chunk": (lambda: x(5).chunk(0), "chunk"),
    "negative size": (lambda: flame.zeros(2, -1), "negative"),
    "empty": (lambda: flame.empty(-3), "negative"),
    "rand": (lambda: flame.rand(-3), "-3"),
    "nested": (lambda: flame.tensor([[1, 2], [3]]), "equal lengths"),
    "one number": (lambda: x(2).item(), "(2,)"),
    "truth": (lambda: bool(x(2)), "ambiguous"),
    "in place grows": (lambda: x(2).add_(x(3, 2)), "(2,)"),
    "expanded in place": (lambda: x(1).expand(3).add_(1), "clone"),
    "copy_": (lambda: x(2).copy_(x(3)), "(3,)"),
    "index assignment": (lambda: operator_set(x(3), slice(0, 2), x(3)), "(3,)"),
    "conv channels": (lambda: F.conv2d(x(1, 3, 5, 5), x(2, 4, 3, 3)), "(2, 4, 3, 3)"),
    "conv rank": (lambda: F.conv2d(x(5, 5), x(2, 1, 3, 3)), "conv2d"),
    "conv kernel": (lambda: F.conv2d(x(1, 1, 2, 2), x(1, 1, 3, 3)), "(3, 3)"),
    "pool kernel": (lambda: F.max_pool2d(x(1, 1, 2, 2), 3), "max_pool2d"),
    "layer_norm": (lambda: F.layer_norm(x(2, 3), (4,)), "(4,)"),
    "group_norm": (lambda: F.group_norm(x(2, 3, 4), 2), "group"),
    "cross entropy": (lambda: F.cross_entropy(x(2, 3), i(0, 1, 2)), "(3,)"),
    "einsum": (lambda: flame.einsum("ij,jk->ik", x(2, 3), x(4, 5)), "einsum"),
    "einsum operands": (lambda: flame.einsum("ij,jk->ik", x(2, 3)), "einsum"),
    "unfold": (lambda: x(3).unfold(0, 4, 1), "unfold"),
    "strides": (lambda: x(3).as_strided((2,), (-1,)), "negative"),
    "mean of nothing": (lambda: x(0).max(), "max"),
    "resize with history": (lambda: (x(2).requires_grad_() * 1).resize_(3), "requires grad"),
}
INDICES: dict[str, tuple[Callable[[], Any], str]] = {
    "above": (lambda: x(3)[3], "3"),
    "below": (lambda: x(3)[-4], "-4"),
    "too many": (lambda: x(3)[0, 0], "too many"),
    "of 0-d": (lambda: x()[0], "too many"),
    "two dots": (lambda: x(2, 2)[..., ...], "Ellipsis"),
    "tensor": (lambda: x(3)[i(0, 3)], "3"),
    "negative tensor": (lambda: x(3)[i(0, -4)], "-4"),
    "mask": (lambda: x(3)[flame.tensor([True, False])], "mask"),
    "write": (lambda: operator_set(x(3), i(5), 1.0), "5"),
    "gather": (lambda: x(3).gather(0, i(3)), "3"),
    "gather negative": (lambda: x(3).gather(0, i(-1)), "-1"),
    "scatter": (lambda: x(3).scatter(0, i(7), x(1)), "7"),
    "index_select": (lambda: x(3).index_select(0, i(3)), "3"),
    "index_add": (lambda: x(3).index_add(0, i(9), x(1)), "9"),
    "take_along_dim": (lambda: flame.take_along_dim(x(3), i(4), 0), "4"),
    "embedding": (lambda: F.embedding(i(4), x(3, 2)), "4"),
    "one_hot": (lambda: F.one_hot(i(3), 3), "3"),
    "label": (lambda: F.cross_entropy(x(1, 3), i(3)), "3"),
    "negative label": (lambda: F.nll_loss(x(1, 3), i(-1)), "-1"),
    "dimension": (lambda: x(2, 3).sum(2), "2"),
    "negative dimension": (lambda: x(2, 3).softmax(-3), "-3"),
    "transpose": (lambda: x(2, 3).transpose(0, 2), "2"),
    "diagonal": (lambda: x(3).diagonal(), "diagonal"),
    "narrow": (lambda: x(3).narrow(0, 2, 2), "narrow"),
    "select": (lambda: x(3).select(0, 3), "3"),
    "size": (lambda: x(3).size(1), "1"),
    "squeeze": (lambda: x(3).squeeze(1), "1"),
    "unsqueeze": (lambda: x(3).unsqueeze(3), "3"),
    "topk": (lambda: x(3).topk(4), "4"),
    "huge": (lambda: x(3)[2**70], str(2**70)),
}
TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: x(2) + "a", "str"),
    "nothing": (lambda: x(2) + None, "missing"),
    "list": (lambda: x(2) * [1, 2], "list"),
    "complex": (lambda: x(2) * 1j, "complex"),
    "object": (lambda: flame.add(x(2), object()), "object"),
    "no tensor": (lambda: flame.exp("a"), "str"),
    "huge number": (lambda: x(2) + 2**70, "int64"),
    "huge element": (lambda: flame.tensor([2**70]), "int64"),
    "nan to integer": (lambda: flame.tensor([NAN], dtype=flame.int64), "int64"),
    "small dtype": (lambda: flame.tensor([300], dtype=flame.int8), "int8"),
    "strings": (lambda: flame.tensor(["a", "b"]), "<U1"),
    "objects": (lambda: flame.tensor([None, 1]), "objects"),
    "dicts": (lambda: flame.tensor({"a": 1}), "objects"),
    "numpy dtype": (lambda: flame.zeros(2, dtype=np.float32), "float32"),
    "dtype by name": (lambda: flame.tensor([1], dtype="int64"), "int64"),
    "complex array": (lambda: flame.from_numpy(np.ones(2, np.complex64)), "complex64"),
    "uint64 array": (lambda: flame.tensor(np.ones(2, np.uint64)), "uint64"),
    "dates": (lambda: flame.from_numpy(np.zeros(2, "datetime64[s]")), "M8"),
    "from a list": (lambda: flame.from_numpy([1, 2]), "list"),
    "shape of floats": (lambda: flame.zeros(2.5), "2.5"),
    "shape of text": (lambda: flame.zeros("a"), "a"),
    "reshape": (lambda: x(2).reshape("a"), "a"),
    "bool arithmetic": (lambda: -x(2, dtype=flame.bool), "bool"),
    "float bits": (lambda: x(2) & x(2), "float32"),
    "integer in place": (lambda: x(2, dtype=flame.int64).add_(1.5), "int64"),
    "integer division in place": (lambda: x(2, dtype=flame.int64).div_(2), "int64"),
    "subscript text": (lambda: x(2)["a"], "str"),
    "subscript float": (lambda: x(2)[1.0], "float"),
    "subscript tensor": (lambda: x(2)[x(2)], "float32"),
    "float index": (lambda: x(2).gather(0, x(1)), "float32"),
    "cat of numbers": (lambda: flame.cat([1, 2]), "int"),
    "cat of a tensor": (lambda: flame.cat(3), "cat"),
    "matmul dtypes": (lambda: x(2, 2) @ x(2, 2, dtype=flame.float64), "float64"),
    "dim text": (lambda: x(2).sum("a"), "'a'"),
    "requires_grad": (lambda: flame.ones(2, dtype=flame.int64, requires_grad=True), "int64"),
    "float seed": (lambda: flame.manual_seed("a"), "seed"),
    "parameter": (lambda: nn.Parameter([1.0]), "list"),  # type: ignore[arg-type]
    "to": (lambda: x(2).to(5), "5"),
    "label dtype": (lambda: F.nll_loss(x(2, 3), x(2)), "float32"),
    "device": (lambda: flame.zeros(2, device="quantum"), "quantum"),
    "device number": (lambda: flame.zeros(2, device="cpu:1"), "one CPU device"),
}
VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "arange step": (lambda: flame.arange(0, 5, 0), "step"),
    "arange direction": (lambda: flame.arange(5, 0), "step"),
    "arange nan": (lambda: flame.arange(0, NAN), "nan"),
    "slice step": (lambda: x(4)[::-1], "flip"),
    "slice zero": (lambda: x(4)[::0], "step"),
    "integer zero": (lambda: flame.div(i(1), 0, rounding_mode="floor"), "zero"),
    "rounding mode": (lambda: flame.div(x(1), 2, rounding_mode="up"), "up"),
    "stride zero": (lambda: F.conv2d(x(1, 1, 4, 4), x(1, 1, 2, 2), stride=0), "stride"),
    "dilation zero": (lambda: F.conv2d(x(1, 1, 4, 4), x(1, 1, 2, 2), dilation=0), "dilation"),
    "padding": (lambda: F.conv2d(x(1, 1, 4, 4), x(1, 1, 2, 2), padding=-1), "padding"),
    "padding name": (lambda: F.conv2d(x(1, 1, 4, 4), x(1, 1, 2, 2), padding="big"), "big"),
    "groups": (lambda: F.conv2d(x(1, 3, 4, 4), x(3, 1, 2, 2), groups=2), "groups"),
    "pool stride": (lambda: F.max_pool2d(x(1, 1, 4, 4), 2, stride=0), "stride"),
    "dropout": (lambda: F.dropout(x(2), 1.5), "1.5"),
    "dropout nan": (lambda: F.dropout(x(2), NAN), "nan"),
    "reduction": (lambda: F.mse_loss(x(2), x(2), reduction="median"), "median"),
    "interpolation": (lambda: F.interpolate(x(1, 1, 2, 2), size=(0, 2)), "0"),
    "bernoulli": (lambda: flame.bernoulli(flame.tensor([1.5])), "1"),
    "multinomial": (lambda: flame.multinomial(flame.zeros(3), 1), "multinomial"),
    "multinomial negative": (
        lambda: flame.multinomial(flame.tensor([-1.0, 2.0]), 1),
        "multinomial",
    ),
    "randint": (lambda: flame.randint(5, 5, (2,)), "5"),
    "randperm": (lambda: flame.randperm(-1), "-1"),
    "linspace": (lambda: flame.linspace(0, 1, -1), "-1"),
    "eye": (lambda: flame.eye(-1), "-1"),
    "repeat": (lambda: x(2).repeat(-1), "-1"),
    "pad": (lambda: F.pad(x(2), (-3, 0)), "pad"),
    "reflect": (lambda: F.pad(x(1, 2, 2), (5, 0), mode="reflect"), "pad"),
    "einsum letters": (lambda: flame.einsum("i1->i", x(2, 2)), "einsum"),
    "memory format": (lambda: x(1, 1, 1, 1).contiguous(memory_format="blue"), "blue"),
    "normal": (lambda: flame.normal(0.0, -1.0, (2,)), "-1"),
}


def operator_set(tensor: flame.Tensor, index: Any, value: Any) -> None:
    tensor[index] = value


def check(call: Callable[[], Any], word: str, kind: type[Exception]) -> None:
    with pytest.raises(FlameError) as caught:
        call()
    assert isinstance(caught.value, kind)
    message = str(caught.value)
    assert word in message, message
    assert len(message) > 15


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    check(*SHAPES[name], ValueError)


@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str) -> None:
    check(*INDICES[name], (IndexError, ValueError))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TYPES)
def test_types(name: str) -> None:
    check(*TYPES[name], (TypeError, ValueError, RuntimeError))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    check(*VALUES[name], Exception)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: flame.zeros(2**40, 2**40), lambda: flame.empty(2**62), lambda: flame.ones(2**45),
        lambda: flame.rand(2**50), lambda: flame.arange(2**55), lambda: flame.eye(2**31),
        lambda: flame.zeros(1).expand(2**45).clone(),
        lambda: flame.zeros(2**20, 1) + flame.zeros(2**25),
        lambda: flame.zeros(1).repeat(2**50), lambda: flame.empty_strided((2,), (2**60,)),
    ],
)  # fmt: skip
def test_more_memory_than_there_is(make: Callable[[], Any]) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        make()
    assert isinstance(caught.value, MemoryError)
    assert flame.ones(3).sum().item() == 3  # life goes on


def test_sizes_beyond_int64() -> None:
    for size in (2**63, 2**70):
        with pytest.raises(FlameError):
            flame.zeros(size)
        with pytest.raises(FlameError):
            flame.zeros(1).expand(size)


def test_many_dimensions() -> None:
    shape = (1,) * 70
    with pytest.raises(FlameError, match="64"):
        (flame.ones(1).reshape(shape) + 1).numpy()
    assert flame.ones((1,) * 30).add(1).sum().item() == 2
    assert flame.ones((2,) * 12).permute(*reversed(range(12))).contiguous().sum().item() == 4096


# --- states ---------------------------------------------------------------------------------------


def test_a_subclass_that_never_called_its_constructor() -> None:
    bare = Uninitialised()
    for use in (
        lambda: bare + 1, lambda: bare.shape, lambda: repr(bare), lambda: bare.sum(),
        lambda: copy.deepcopy(bare), lambda: bare[0], lambda: flame.cat([bare]),
    ):  # fmt: skip
        with pytest.raises((FlameError, AttributeError)):
            use()


def test_after_an_error_everything_goes_on() -> None:
    y = flame.ones(3, requires_grad=True)
    z = y * 2
    for bad in (lambda: z + x(4), lambda: z[7], lambda: z.add_(x(4)), lambda: z.backward()):
        with pytest.raises(FlameError):
            bad()
    z.sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [2, 2, 2]


def test_a_failed_write_changes_nothing() -> None:
    y = flame.arange(4.0)
    version = y._version
    for bad in (
        lambda: y.add_(x(5)), lambda: operator_set(y, i(1, 9), 5.0), lambda: y.copy_(x(3)),
        lambda: y.index_add_(0, i(9), x(1)), lambda: y.scatter_(0, i(2, 9), x(2)),
    ):  # fmt: skip
        with pytest.raises(FlameError):
            bad()
    assert y._version >= version
    assert y[0].item() == 0
    leaf = flame.ones(2, requires_grad=True)
    with pytest.raises(GradientError):
        leaf[0] = 5
    assert leaf.tolist() == [1, 1]


def test_nan_labels() -> None:
    with pytest.raises(FlameError):
        F.cross_entropy(x(2, 3), flame.tensor([0.0, NAN]))
    with pytest.raises(FlameError):
        F.binary_cross_entropy(x(2) / 2, x(3))


def test_errors_are_also_the_builtin_ones() -> None:
    assert issubclass(ShapeError, ValueError)
    assert issubclass(DTypeError, TypeError)
    assert issubclass(IndexRangeError, IndexError)
    assert issubclass(OutOfMemoryError, MemoryError)


# --- whatever comes -------------------------------------------------------------------------------

BOUNDED = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
    st.lists(st.integers(-3, 3), max_size=3), st.just(object()), st.just(flame.ones(2, 2)),
    st.just(np.ones(2)), st.just(flame.float32), st.just(Ellipsis), st.just(slice(0, -1, -1)),
)  # fmt: skip
FUNCTIONS = (
    "add", "matmul", "cat", "stack", "sum", "reshape", "permute", "where", "clamp", "gather",
    "topk", "arange", "zeros", "full", "eye", "linspace", "softmax", "cumsum", "roll", "flip",
    "pow", "exp", "argmax", "split", "tril", "einsum", "norm", "index_select", "masked_fill",
    "repeat_interleave",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@BOUNDED
@given(data=st.data())
def test_junk(name: str, data: st.DataObject) -> None:
    """Python's own complaint about the number of arguments is as good as ours."""
    function = getattr(flame, name)
    first = data.draw(st.one_of(st.just(flame.ones(2, 3)), JUNK))
    arguments = [first, *data.draw(st.lists(JUNK, max_size=2))]
    try:
        function(*arguments)
    except FlameError:
        pass
    except TypeError as error:
        if "argument" not in str(error):
            raise


@BOUNDED
@given(index=st.one_of(JUNK, st.tuples(JUNK, JUNK)), value=JUNK)
def test_junk_subscripts(index: Any, value: Any) -> None:
    tensor = flame.ones(3, 4)
    for call in (lambda: tensor[index], lambda: operator_set(tensor, index, value)):
        with contextlib.suppress(FlameError):
            call()


@BOUNDED
@given(data=st.recursive(JUNK, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_junk_tensors(data: Any) -> None:
    with contextlib.suppress(FlameError):
        flame.tensor(data)


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
)
def test_labels_that_are_nan(loss: str) -> None:
    target = flame.full((3, 4), 0.25)
    target[1, 2] = float("nan")
    with pytest.raises(FlameError, match="target of the loss is NaN"):
        getattr(flame.nn.functional, loss)(flame.full((3, 4), 0.5), target)


def test_class_labels_made_of_nan() -> None:
    labels = flame.tensor([0.0, float("nan"), 2.0])
    with pytest.raises(FlameError, match="cross_entropy"):
        flame.nn.functional.cross_entropy(flame.ones(3, 4), labels)
    with pytest.raises(FlameError, match="class"):
        flame.nn.functional.cross_entropy(flame.ones(3, 4), labels.to(flame.int64))
