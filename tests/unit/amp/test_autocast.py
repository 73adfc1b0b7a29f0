"""Regions of autocast: what is on where, what is cast, kept, and cast back."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import flame
import flame.nn.functional as F
from flame import amp, nn
from flame.autograd import Function, checkpoint
from flame.compiler.passes import optimize
from flame.core.autocast import autocast as state
from flame.core.errors import DeviceError, DTypeError, UnsupportedError
from flame.core.types import tensor_type
from flame.graph import Graph
from flame.runtime.storage import Storage


def array(*shape: int, seed: int = 0) -> flame.Tensor:
    return flame.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# --- where it is on -------------------------------------------------------------------------------


def test_regions_nest_and_end() -> None:
    x = array(3, 3)
    assert not flame.is_autocast_enabled("cpu")
    with flame.autocast("cpu"):
        assert flame.is_autocast_enabled("cpu")
        assert not flame.is_autocast_enabled("cuda")
        assert (x @ x).dtype is flame.bfloat16
        with flame.autocast("cpu", enabled=False):
            assert not flame.is_autocast_enabled("cpu")
            assert (x @ x).dtype is flame.float32
            with flame.autocast("cpu", dtype=flame.float16):
                assert flame.get_autocast_dtype("cpu") is flame.float16
                assert (x @ x).dtype is flame.float16
        assert flame.get_autocast_dtype("cpu") is flame.bfloat16
        assert (x @ x).dtype is flame.bfloat16
    assert (x @ x).dtype is flame.float32
    assert state.depth == 0
    assert state.casts is None


def test_a_region_takes_its_dtype_from_around() -> None:
    with flame.autocast("cpu", dtype=flame.float16), flame.autocast("cpu") as inner:
        assert inner.fast_dtype is flame.float16
    assert flame.get_autocast_dtype("cpu") is flame.bfloat16
    assert flame.get_autocast_dtype("cuda") is flame.float16


def test_a_region_ends_where_something_raises() -> None:
    with pytest.raises(ZeroDivisionError), flame.autocast("cpu"):
        raise ZeroDivisionError
    assert not flame.is_autocast_enabled("cpu")
    assert state.on is False


def test_the_device_of_the_operands_decides() -> None:
    x = array(3, 3)
    with flame.autocast("cuda"):
        assert flame.is_autocast_enabled("cuda")
        assert (x @ x).dtype is flame.float32
        with flame.autocast("cpu"):
            assert (x @ x).dtype is flame.bfloat16


def test_as_a_decorator() -> None:
    @flame.autocast("cpu", dtype=flame.bfloat16)
    def product(x: flame.Tensor, depth: int = 0) -> flame.Tensor:
        """A product."""
        return product(x @ x, depth - 1) if depth else x @ x

    x = array(3, 3)
    assert product(x, depth=2).dtype is flame.bfloat16
    assert product.__name__ == "product"
    assert product.__doc__ == "A product."
    assert (x @ x).dtype is flame.float32


def test_one_region_may_be_entered_again() -> None:
    region = flame.autocast("cpu")
    with region, region:
        assert flame.is_autocast_enabled("cpu")
    assert not flame.is_autocast_enabled("cpu")
    assert repr(region) == "autocast('cpu', dtype=flame.bfloat16, enabled=True)"


def test_it_belongs_to_its_thread() -> None:
    x = array(3, 3)
    found = []

    def other() -> None:
        found.append((flame.is_autocast_enabled("cpu"), (x @ x).dtype))

    with flame.autocast("cpu"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [(False, flame.float32)]


def test_the_package_has_the_same_names() -> None:
    assert amp.autocast is flame.autocast
    assert amp.is_autocast_available("cpu")
    assert not amp.is_autocast_available("tpu")


@pytest.mark.parametrize("device_type", ["cuda:0", "tpu", None, 3])
def test_bad_device_types(device_type: Any) -> None:
    for function in (flame.autocast, flame.is_autocast_enabled, flame.get_autocast_dtype):
        with pytest.raises(DeviceError, match="device type must be 'cpu' or 'cuda'"):
            function(device_type)


@pytest.mark.parametrize("dtype", [flame.float32, flame.float64, flame.int8, "bfloat16"])
def test_bad_dtypes(dtype: Any) -> None:
    with pytest.raises(DTypeError, match="bfloat16 or float16"):
        flame.autocast("cpu", dtype=dtype)


# --- what is cast ---------------------------------------------------------------------------------


def test_float64_and_integers_are_left_alone() -> None:
    wide, whole = array(3, 3).double(), flame.ones((3, 3), dtype=flame.int64)
    with flame.autocast("cpu"):
        assert (wide @ wide).dtype is flame.float64
        assert wide.exp().dtype is flame.float64
        assert (whole @ whole).dtype is flame.int64
        assert whole.sum().dtype is flame.int64
        assert flame.is_autocast_enabled("cpu")


def test_writes_in_place_are_not_cast() -> None:
    with flame.autocast("cpu"):
        x = array(3, 3).bfloat16()
        x.exp_()
        assert x.dtype is flame.bfloat16
        x.pow_(flame.ones(3, dtype=flame.bfloat16) * 2)
        assert x.dtype is flame.bfloat16


def test_a_wanted_dtype_is_kept() -> None:
    x = array(4, 3).bfloat16()
    with flame.autocast("cpu"):
        for made in (
            x.sum(dtype=flame.bfloat16),
            x.sum(1, dtype=flame.bfloat16),
            x.prod(0, dtype=flame.bfloat16),
            x.cumsum(0, dtype=flame.bfloat16),
            x.cumprod(0, dtype=flame.bfloat16),
            x.softmax(1, dtype=flame.bfloat16),
            F.log_softmax(x, 1, dtype=flame.bfloat16),
            flame.norm(x, dtype=flame.bfloat16),
        ):
            assert made.dtype is flame.bfloat16


def test_gradients_have_the_dtype_of_what_they_belong_to() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4).requires_grad_()
    with flame.autocast("cpu"):
        loss = layer(x).square().mean()
    loss.backward()
    assert loss.dtype is flame.float32
    assert x.grad is not None
    assert x.grad.dtype is flame.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is flame.float32
    exact = flame.autograd.grad([layer(x).square().mean()], [layer.weight])[0]
    np.testing.assert_allclose(layer.weight.grad.numpy(), exact.numpy(), rtol=0.05, atol=0.02)


def test_backward_runs_in_the_types_of_forward_inside_of_a_region_too() -> None:
    def gradients(inside: bool) -> list[Any]:
        x, w = array(4, 4).requires_grad_(), array(4, 4, seed=1).requires_grad_()
        with flame.autocast("cpu"):
            loss = ((x @ w).exp() * x).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        return [x.grad.numpy(), w.grad.numpy()]

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_array_equal(inside, outside)


def test_second_derivatives_are_not_cast() -> None:
    x = array(3, 3).requires_grad_()
    with flame.autocast("cpu"):
        (first,) = flame.autograd.grad([x.sin().square().sum()], [x], create_graph=True)
        assert first.dtype is flame.float32
        (second,) = flame.autograd.grad([first.sum()], [x])
    wanted = 2 * np.cos(2 * x.detach().numpy())
    np.testing.assert_allclose(second.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_binary_cross_entropy_is_refused_on_cuda_alone() -> None:
    p, t = array(4).sigmoid(), flame.ones(4)
    with flame.autocast("cpu"):
        assert F.binary_cross_entropy(p.bfloat16(), t).dtype is flame.float32
    storage = Storage.allocate(16)
    there = flame.Tensor.wrap(storage, 0, tensor_type(flame.float32, (4,), None, "cuda:0"))
    with (
        flame.autocast("cuda"),
        pytest.raises(UnsupportedError, match="binary_cross_entropy_with_logits"),
    ):
        F.binary_cross_entropy(there, there)


# --- casts of parameters --------------------------------------------------------------------------


def casts_of(parameter: flame.Tensor) -> list[Any]:
    return [made for held, _, made in (state.casts or {}).values() if held is parameter]


def test_the_cast_of_a_parameter_is_kept() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4)
    with flame.autocast("cpu"):
        layer(x)
        (first,) = casts_of(layer.weight)
        with flame.autocast("cpu"):
            layer(x)
        assert casts_of(layer.weight) == [first]
        assert not casts_of(x)
    assert state.casts is None


def test_no_cast_is_kept_where_that_is_off() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4)
    with flame.autocast("cpu", cache_enabled=False):
        layer(x)
        assert state.casts == {}
        with flame.autocast("cpu", cache_enabled=True):
            layer(x)
            assert casts_of(layer.weight)


def test_a_parameter_that_was_changed_is_cast_anew() -> None:
    layer, x = nn.Linear(4, 3, bias=False), array(5, 4)
    with flame.autocast("cpu"):
        before = layer(x)
        with flame.no_grad():
            layer.weight.mul_(2.0)
        after = layer(x)
    once, twice = (t.detach().float().numpy() for t in (before, after))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-2)


def test_a_cast_made_without_the_tape_stops_no_gradient() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4)
    with flame.autocast("cpu"):
        with flame.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_two_backward_passes_share_a_cast() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4)
    with flame.autocast("cpu"):
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        once = layer.weight.grad.numpy().copy()
        layer(x).sum().backward()
    np.testing.assert_allclose(layer.weight.grad.numpy(), 2 * once, rtol=1e-6)


# --- with the rest --------------------------------------------------------------------------------


def test_a_checkpoint_runs_again_as_it_ran_first() -> None:
    first, second = nn.Linear(4, 8), nn.Linear(8, 3)

    def block(x: flame.Tensor) -> flame.Tensor:
        return second(first(x).relu().exp())

    def gradients(run: Any) -> Any:
        for p in (*first.parameters(), *second.parameters()):
            p.grad = None
        x = array(5, 4).requires_grad_()
        with flame.autocast("cpu"):
            loss = run(x).float().square().sum()
        loss.backward()  # outside of the region
        assert x.grad is not None
        return [x.grad.numpy(), *[p.grad.numpy() for p in first.parameters() if p.grad is not None]]

    kept, recomputed = gradients(block), gradients(lambda x: checkpoint(block, x))
    for a, b in zip(kept, recomputed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_compiled_function_has_a_program_for_each_state() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4)

    @flame.compile
    def forward(x: flame.Tensor) -> flame.Tensor:
        return layer(x)

    regions: list[tuple[Any, Any]] = [
        (flame.autocast("cpu", enabled=False), flame.float32),
        (flame.autocast("cpu"), flame.bfloat16),
        (flame.autocast("cpu", dtype=flame.float16), flame.float16),
    ]
    for _ in range(2):
        for region, dtype in regions:
            with region:
                made, eager = forward(x), layer(x)
            assert made.dtype is dtype
            np.testing.assert_allclose(
                made.float().detach().numpy(), eager.float().detach().numpy(), rtol=2e-2, atol=1e-2
            )
    assert forward.recordings == len(regions)


def test_a_cast_of_eager_code_is_not_taken_into_a_recording() -> None:
    layer, x = nn.Linear(4, 3), array(5, 4)

    @flame.compile
    def step(x: flame.Tensor) -> flame.Tensor:
        layer.weight.grad = layer.bias.grad = None
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    with flame.autocast("cpu"):
        layer(x)
        step(x)
        with flame.no_grad():
            layer.weight.mul_(2.0)
        changed = step(x)
        wanted = layer(x).square().mean()
    np.testing.assert_allclose(changed.numpy(), wanted.detach().numpy(), rtol=1e-2)
    assert layer.weight.grad is not None


def test_equal_casts_are_merged_by_the_compiler() -> None:
    w = array(64, 64).requires_grad_()

    @flame.compile
    def forward(x: flame.Tensor) -> flame.Tensor:
        with flame.autocast("cpu"):
            return (x @ w) @ w

    def casts(graph: Graph) -> int:
        """Of the parameter, not of the products."""
        nodes = [n for n in graph.nodes if n.op.name == "copy"]
        return sum(getattr(n.inputs[0], "type", None) is w.type for n in nodes)

    forward(array(8, 64))
    assert casts(forward.graph) == 2
    assert casts(optimize(forward.graph)) == 1


class _Product(Function):
    @staticmethod
    @amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Any, w: Any) -> Any:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, g: Any) -> Any:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


class _Exact(Function):
    @staticmethod
    @amp.custom_fwd(device_type="cpu", cast_inputs=flame.float32)
    def forward(ctx: Any, x: Any) -> Any:
        assert not flame.is_autocast_enabled("cpu")
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    @amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, g: Any) -> Any:
        assert not flame.is_autocast_enabled("cpu")
        (x,) = ctx.saved_tensors
        return g @ x.t() + x.t() @ g


def test_custom_functions_go_back_as_they_went_forward() -> None:
    x, w = array(4, 4).requires_grad_(), array(4, 4, seed=1).requires_grad_()
    with flame.autocast("cpu"):
        made = _Product.apply(x, w)
        exact = _Exact.apply(x.bfloat16())
    assert made.dtype is flame.bfloat16
    assert exact.dtype is flame.float32
    (made.float().sum() + exact.sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype is flame.float32
    assert w.grad is not None


def test_the_policy_of_an_op_stands_in_its_declaration() -> None:
    from flame.ops.op import OPS

    assert OPS["matmul"].autocast == "lower"
    assert OPS["exp"].autocast == "float32"
    assert OPS["add"].autocast is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_equal_those_of_torch(dtype: str) -> None:
    a, b = array(33, 70), array(70, 19, seed=1)
    with flame.autocast("cpu", dtype=getattr(flame, dtype)):
        ours = a @ b
    with torch.autocast("cpu", getattr(torch, dtype)):
        theirs = torch.from_numpy(a.numpy()) @ torch.from_numpy(b.numpy())
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert ours.dtype is getattr(flame, dtype)
    np.testing.assert_allclose(ours.float().numpy(), theirs.float().numpy(), rtol=2e-2, atol=5e-2)
