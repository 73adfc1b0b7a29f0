"""Ops of the table inside of `flame.compile`, with their gradients, against eager execution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from flame.autograd import grad
from flame.autograd.mode import no_grad
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.ops.op import Op, Sample
from flame.recording import compile
from flame.tensor import Tensor, from_array
from flame.testing.references import TOLERANCE
from flame.testing.sampling import attributes_on, is_differentiable, make_inputs, placed

HALF: Final = (dtypes.float16, dtypes.bfloat16)

Step = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Any]]]


def step_of(op: Op, sample: Sample, operands: Sequence[Any], device: str = "cpu") -> Step:
    """``step(tensors, weights)``: what the op gives, and gradients of its results."""
    places = [i for i, x in enumerate(operands) if isinstance(x, Tensor)]
    differentiable = [i for i, x in enumerate(sample.inputs) if is_differentiable(op, x)]
    attributes = attributes_on(op, sample, device)

    def step(
        tensors: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Any]]:
        inputs = list(operands)
        for place, tensor in zip(places, tensors, strict=True):
            inputs[place] = tensor.detach()
            if op.differentiable and place in differentiable and tensor.is_floating_point():
                inputs[place].requires_grad_()
        made = op(*inputs, **attributes)
        results = made if isinstance(made, tuple) else (made,)
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        wanted = [
            (r, w)
            for r, w in zip(results[: len(results) - op.extras], weights, strict=False)
            if r.requires_grad
        ]
        gradients: Sequence[Any] = ()
        if wanted:
            gradients = grad(
                [r for r, _ in wanted], leaves, [w for _, w in wanted], allow_unused=True
            )
        return [r.detach() for r in results], list(gradients)

    return step


def weights_of(
    op: Op, sample: Sample, operands: Sequence[Any], seed: int, device: str = "cpu"
) -> list[Tensor]:
    """Gradients for the results, in their dtypes."""
    with no_grad():
        made = op(*operands, **attributes_on(op, sample, device))
    random = np.random.default_rng(1000 + seed)
    return [
        placed(
            from_array(np.asarray(random.uniform(-1, 1, r.shape), np.float64)).to(r.dtype),
            r.type.device,
        )
        for r in (made if isinstance(made, tuple) else (made,))
    ]


def check_compiled(
    op: Op, sample: Sample, dtype: DType, layout: str = "contiguous", device: str = "cpu"
) -> None:
    """Raise AssertionError unless values and gradients of the compiled op are those of the eager
    one, at the recorded call and at a replay with other data."""
    operands, _ = make_inputs(sample, dtype, 0, layout, device)
    step = step_of(op, sample, operands, device)
    compiled = compile(step)
    for seed in (0, 1):
        operands, _ = make_inputs(sample, dtype, seed, layout, device)
        tensors = [x for x in operands if isinstance(x, Tensor)]
        weights = weights_of(op, sample, operands, seed, device)
        expected = step(tensors, weights)
        exact = expected
        if dtype in HALF:
            wide = step_of(op, sample, [widened(x) for x in operands], device)
            exact = wide([widened(x) for x in tensors], [widened(x) for x in weights])
        found = compiled(tensors, weights)
        label = f"{op.name} {dtype.name} {layout}"
        compare_steps(found, expected, exact if dtype in HALF else None, op, label)
    assert compiled.recordings == 1


def compare_steps(
    found: tuple[list[Tensor], list[Any]],
    expected: tuple[list[Tensor], list[Any]],
    exact: tuple[list[Tensor], list[Any]] | None,
    op: Op,
    label: str,
) -> None:
    """Raise AssertionError where what one step gave is not what another one did."""
    for kind, name in enumerate(("value", "gradient")):
        assert len(found[kind]) == len(expected[kind])
        for i, (got, want) in enumerate(zip(found[kind], expected[kind], strict=True)):
            true = None if exact is None else exact[kind][i]
            _assert_equal(got, want, true, op, f"{label}: {name} {i}")


def widened(x: Any) -> Any:
    """Half-width floats as float64."""
    return x.to(dtypes.float64) if isinstance(x, Tensor) and x.dtype in HALF else x


def _assert_equal(found: Any, expected: Any, exact: Any, op: Op, label: str) -> None:
    """Raise AssertionError where ``found`` is neither near ``expected`` nor near ``exact``.

    exact: of half-width floats, what a float64 computation gives, for a fused one does not round
    what lies between.
    """
    assert (found is None) == (expected is None), label
    if found is None:
        return
    assert found.dtype is expected.dtype, label
    got, want = found.cpu().numpy(), expected.cpu().numpy()
    assert got.shape == want.shape, label
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, err_msg=label)
        return
    relative, absolute = (t * op.tolerance for t in TOLERANCE[found.dtype])
    got, want = got.astype(np.float64), want.astype(np.float64)
    scale = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0.0))
    if exact is not None:
        true = exact.cpu().numpy()
        near = np.isclose(got, true, rtol=relative, atol=absolute * scale, equal_nan=True)
        want = np.where(near, got, want)
    np.testing.assert_allclose(got, want, rtol=relative, atol=absolute * scale, err_msg=label)
