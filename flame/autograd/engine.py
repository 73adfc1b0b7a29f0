"""The backward pass: nodes from the youngest to the oldest, gradients summed where paths meet.

As an edge always points to an older node, popping by age visits a node after all that use it;
there is no recursion and no counting of dependencies.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Sequence
from typing import Any

from flame.autograd.mode import no_grad, set_grad_enabled
from flame.autograd.node import Edge, Node
from flame.core.errors import DTypeError, GradientError, ShapeError
from flame.ops.arithmetic import add
from flame.ops.conversion import convert
from flame.ops.creation import ones_like, zeros
from flame.ops.reductions import sum_to


def edge_of(tensor: Any) -> Edge:
    """Where the gradient of ``tensor`` goes: its node, itself if it is a leaf, or nowhere."""
    node = tensor.current_node()
    if node is not None:
        return node, tensor.output_index
    return (tensor, 0) if tensor.requires_grad else None


class _Pass:
    """One backward pass: gradients on their way, and nodes that wait for them."""

    def __init__(self, create_graph: bool) -> None:
        self.create_graph = create_graph
        self.pending: dict[Node, list[Any]] = {}
        self.owned: set[tuple[int, int]] = set()  # sums made here, which may be added to in place
        self.heap: list[tuple[int, int, Node]] = []
        self.leaves: dict[int, tuple[Any, Any]] = {}
        self.captures: dict[tuple[int, int], Any] = {}

    def give(self, edge: Edge, grad: Any) -> None:
        if edge is None or grad is None:
            return
        target, position = edge
        if not isinstance(target, Node):
            held = self.leaves.get(id(target))
            total = grad if held is None else add(held[1], grad)
            self.leaves[id(target)] = (target, total)
            return
        slots = self.pending.get(target)
        if slots is None:
            slots = self.pending[target] = [None] * len(target.outputs)
            heapq.heappush(self.heap, (-target.age, id(target), target))
        before = slots[position]
        if before is None:
            slots[position] = grad
        elif (target.age, position) in self.owned:
            before.add_(grad)
        else:
            slots[position] = add(before, grad)
            if not self.create_graph and before.type is grad.type:
                self.owned.add((target.age, position))

    def run(self, retain_graph: bool) -> None:
        while self.heap:
            _, _, node = heapq.heappop(self.heap)
            grads = self.pending.pop(node)
            if node.hooks:
                _run_hooks(node, grads)
            for position, grad in enumerate(grads):
                if (id(node), position) in self.captures:
                    self.captures[id(node), position] = grad
            results = self._apply(node, grads)
            edges = node.edges
            if not retain_graph:
                node.release()
            for edge, grad in zip(edges, results, strict=True):
                self.give(edge, grad)
            del grads, results

    def _apply(self, node: Node, grads: list[Any]) -> list[Any]:
        full = [
            zeros(t.shape, dtype=t.dtype, device=t.device) if g is None else g
            for g, t in zip(grads, node.outputs, strict=True)
        ]
        results = list(node.apply(full, self.create_graph))
        if len(results) != len(node.edges):
            raise GradientError(
                f"backward of {node.name} gave {len(results)} gradients for "
                f"{len(node.edges)} inputs"
            )
        for position, (edge, grad) in enumerate(zip(node.edges, results, strict=True)):
            if edge is not None and grad is not None:
                results[position] = _fit(edge, grad)
        if node.line is not None:
            _check_finite(node, results)
        return results


def _fit(edge: tuple[Any, int], grad: Any) -> Any:
    """Sum broadcast dimensions away and take on the dtype of what the gradient belongs to."""
    target, position = edge
    wanted = target.outputs[position] if isinstance(target, Node) else target.type
    have = grad.type
    if have.shape != wanted.shape:
        grad = sum_to(grad, wanted.shape)
    if have.dtype is not wanted.dtype:
        grad = convert(grad, dtype=wanted.dtype)
    return grad


def _check_finite(node: Node, results: Sequence[Any]) -> None:
    for grad in results:
        if grad is not None and bool(grad.isnan().any().item()):
            raise GradientError(
                f"backward of {node.name} gave NaN; its forward call was at {node.line}"
            )


def _run_hooks(node: Node, grads: list[Any]) -> None:
    for position, hook in list(node.hooks or ()):
        if grads[position] is not None:
            changed = hook(grads[position])
            if changed is not None:
                grads[position] = changed


def _seed(tensor: Any, gradient: Any) -> Any:
    if not tensor.requires_grad:
        raise GradientError(
            "backward from a tensor that does not require grad: none of the tensors that it was "
            "computed from has requires_grad=True, or it was computed under no_grad"
        )
    if gradient is None:
        if tensor.type.numel != 1:
            raise GradientError(
                f"backward from a tensor of shape {tensor.shape} needs its gradient as argument; "
                "without one, the tensor must be a scalar (call .sum() or .mean() first)"
            )
        return ones_like(tensor)
    if gradient.type.shape != tensor.type.shape:
        raise ShapeError(
            f"the gradient has shape {gradient.shape}, its tensor {tensor.shape}; make them equal"
        )
    if gradient.dtype is not tensor.dtype:
        raise DTypeError(f"the gradient is {gradient.dtype}, its tensor {tensor.dtype}")
    return gradient


def backward(
    tensors: Sequence[Any],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Sequence[Any] | None = None,
) -> None:
    """Accumulate gradients into the ``grad`` of leaves (of ``inputs`` only, if given)."""
    current = _Pass(create_graph)
    keep = create_graph if retain_graph is None else retain_graph
    wanted = None if inputs is None else {id(t) for t in inputs}
    capture = _capture(current, inputs or ())
    with set_grad_enabled(create_graph):
        for tensor, gradient in zip(tensors, gradients, strict=True):
            current.give(edge_of(tensor), _seed(tensor, gradient))
        current.run(keep)
        leaves = current.leaves
        current.leaves = {}
        for key in list(leaves):
            leaf, grad = leaves.pop(key)
            if wanted is None or key in wanted:
                _accumulate(leaf, grad, create_graph)
    for tensor, key in capture:
        if current.captures[key] is not None:
            _accumulate(tensor, current.captures[key], create_graph)


def _capture(current: _Pass, inputs: Sequence[Any]) -> list[tuple[Any, tuple[int, int]]]:
    """Ask for the gradients of tensors that are no leaves."""
    found = []
    for tensor in inputs:
        node = tensor.current_node()
        if node is not None:
            key = (id(node), tensor.output_index)
            current.captures[key] = None
            found.append((tensor, key))
    return found


def _accumulate(leaf: Any, grad: Any, create_graph: bool) -> None:
    for hook in list((leaf.hooks or {}).values()):
        changed = hook(grad)
        grad = grad if changed is None else changed
    if leaf.grad is None:
        exclusive = sys.getrefcount(grad) <= 4 and sys.getrefcount(grad.storage) <= 2
        if create_graph or (exclusive and grad.type.dense):
            leaf.grad = grad
        else:
            leaf.grad = grad.clone()
    elif create_graph:
        leaf.grad = add(leaf.grad, grad)
    else:
        with no_grad():
            leaf.grad.add_(grad)
    for hook in list((leaf.after_hooks or {}).values()):
        hook(leaf)


def grad(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
    allow_unused: bool,
) -> list[Any]:
    """Gradients of ``outputs`` with respect to ``inputs``, leaving every ``grad`` alone."""
    current = _Pass(create_graph)
    keep = create_graph if retain_graph is None else retain_graph
    for position, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise GradientError(f"grad: input {position} does not require grad")
    capture = {id(t): key for t, key in _capture(current, inputs)}
    with set_grad_enabled(create_graph):
        for tensor, gradient in zip(outputs, gradients, strict=True):
            current.give(edge_of(tensor), _seed(tensor, gradient))
        current.run(keep)
    found = []
    for position, tensor in enumerate(inputs):
        key = capture.get(id(tensor))
        result = current.captures[key] if key else current.leaves.get(id(tensor), (None, None))[1]
        if result is None and not allow_unused:
            raise GradientError(
                f"grad: input {position} was not used to compute the outputs; pass "
                "allow_unused=True to get None for it"
            )
        found.append(result)
    return found
