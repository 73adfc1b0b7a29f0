"""The backward pass: nodes from the youngest to the oldest, gradients summed where paths meet.

As an edge always points to an older node, popping by age visits a node after all that use it;
there is no recursion and no counting of dependencies.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from flame.autograd.mode import mode, set_grad_enabled
from flame.autograd.node import Edge, Node
from flame.core.autocast import as_then, autocast
from flame.core.errors import DTypeError, GradientError, ShapeError
from flame.core.types import TensorType
from flame.ops.arithmetic import add
from flame.ops.conversion import convert
from flame.ops.creation import ones_like, zeros
from flame.ops.op import empty_of
from flame.ops.reductions import sum_to


def _in_forward_types() -> AbstractContextManager[None]:
    """No casts by an autocast region: a gradient has the dtype that the forward pass chose."""
    return as_then(autocast.settings, False)


def edge_of(tensor: Any) -> Edge:
    """Where the gradient of ``tensor`` goes: its node, itself if it is a leaf, or nowhere."""
    node = tensor.current_node()
    if node is not None:
        return node, tensor.output_index
    return (tensor, 0) if tensor.requires_grad else None


class _Pass:
    """One backward pass: gradients on their way, and nodes that wait for them.

    useful: ids of the tensors and nodes whose gradients were asked for, and of all nodes that lead
    to one; None where every leaf was.
    """

    def __init__(self, create_graph: bool) -> None:
        self.create_graph = create_graph
        self.pending: dict[Node, list[Any]] = {}
        self.owned: set[tuple[int, int]] = set()  # sums made here, which may be added to in place
        self.heap: list[tuple[int, int, Node]] = []
        self.leaves: dict[int, tuple[Any, Any]] = {}
        self.captures: dict[tuple[int, int], Any] = {}
        self.useful: set[int] | None = None

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
                run_hooks(node.hooks, grads)
            for position, grad in enumerate(grads):
                if (id(node), position) in self.captures:
                    self.captures[id(node), position] = grad
            wanted = None
            if self.useful is not None:
                wanted = [_leads(edge, self.useful) for edge in node.edges]
                if True not in wanted:
                    continue
            results = self._apply(node, grads, wanted)
            edges = node.edges
            if not retain_graph:
                node.release()
            for position, edge in enumerate(edges):
                if wanted is None or wanted[position]:
                    self.give(edge, results[position])
            del grads, results

    def _apply(self, node: Node, grads: list[Any], wanted: list[bool] | None) -> list[Any]:
        if None in grads and node.materialize:
            grads = [
                zeros(t.shape, dtype=t.dtype, device=t.device) if g is None else g
                for g, t in zip(grads, node.outputs, strict=True)
            ]
        try:
            results = list(node.apply(grads, self.create_graph, wanted))
        except Exception as error:
            if node.line is not None:
                error.add_note(f"in backward of {node.name}; its forward call was at {node.line}")
            raise
        if len(results) != len(node.edges):
            raise GradientError(
                f"backward of {node.name} gave {len(results)} gradients for "
                f"{len(node.edges)} inputs"
            )
        for position, (edge, grad) in enumerate(zip(node.edges, results, strict=True)):
            if edge is not None and grad is not None:
                results[position] = _fit(node, edge, grad)
        if mode.anomaly or node.line is not None:
            _check_finite(node, results)
        return results


def _leads(edge: Edge, useful: set[int]) -> bool:
    return edge is not None and id(edge[0]) in useful


def useful_for(roots: Sequence[Edge], targets: set[int]) -> set[int]:
    """The ids of ``targets`` (nodes and leaves) and of the nodes from which one can be reached."""
    reached: dict[int, Node] = {}
    waiting = [edge[0] for edge in roots if edge is not None]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and id(node) not in reached:
            reached[id(node)] = node
            waiting += [edge[0] for edge in node.edges if edge is not None]
    useful = set(targets)
    for node in sorted(reached.values(), key=_age):
        if any(_leads(edge, useful) for edge in node.edges):
            useful.add(id(node))
    return useful


def _age(node: Node) -> int:
    return node.age


def _fit(node: Node, edge: tuple[Any, int], grad: Any) -> Any:
    """Sum broadcast dimensions away and take on the dtype of what the gradient belongs to."""
    target, position = edge
    wanted = target.outputs[position] if isinstance(target, Node) else target.type
    have = grad.type
    if have.shape != wanted.shape:
        if not _expands_to(wanted.shape, have.shape):
            raise ShapeError(
                f"backward of {node.name} gave a gradient of shape {have.shape} for an input of "
                f"shape {wanted.shape}; a gradient has the shape of its input"
            )
        grad = sum_to(grad, wanted.shape)
    if have.dtype is not wanted.dtype:
        grad = convert(grad, dtype=wanted.dtype)
    return grad


def _expands_to(small: Sequence[int], large: Sequence[int]) -> bool:
    ends = large[len(large) - len(small) :]
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small, ends, strict=True))


def _check_finite(node: Node, results: Sequence[Any]) -> None:
    for grad in results:
        if grad is not None and bool(grad.isnan().any().item()):
            where = node.line or "a line unknown: run it inside detect_anomaly() too"
            raise GradientError(
                f"backward of {node.name} gave NaN; its forward call was at {where}"
            )


def run_hooks(hooks: list[tuple[int, Any]], grads: list[Any]) -> None:
    """Call the hooks of a node's outputs; what one returns takes the gradient's place."""
    for position, hook in list(hooks):
        grad = grads[position]
        if grad is not None:
            changed = hook(grad)
            if changed is not None:
                grads[position] = _checked(changed, grad)


def _checked(changed: Any, grad: Any) -> Any:
    """What a hook returned, if it can stand for ``grad``."""
    if not hasattr(changed, "storage"):
        raise GradientError(f"a hook must return a tensor or None, got {type(changed).__name__}")
    if changed.type.shape != grad.type.shape:
        raise ShapeError(
            f"a hook turned a gradient of shape {grad.shape} into {changed.shape}; keep the shape"
        )
    return changed if changed.dtype is grad.dtype else convert(changed, dtype=grad.dtype)


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
    if not hasattr(gradient, "storage"):
        raise DTypeError(f"a gradient must be a tensor or None, got {type(gradient).__name__}")
    if gradient.type.shape != tensor.type.shape:
        raise ShapeError(
            f"the gradient has shape {gradient.shape}, its tensor {tensor.shape}; make them equal"
        )
    return gradient if gradient.dtype is tensor.dtype else convert(gradient, dtype=tensor.dtype)


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
    capture = []
    with set_grad_enabled(create_graph), _in_forward_types():
        seeds = [(edge_of(t), _seed(t, g)) for t, g in zip(tensors, gradients, strict=True)]
        if inputs is not None:
            capture = _capture(current, inputs, [edge for edge, _ in seeds])
        for edge, grad in seeds:
            current.give(edge, grad)
        del seeds
        current.run(keep)
        leaves = current.leaves
        current.leaves = {}
        for key in list(leaves):
            leaf, grad = leaves.pop(key)
            if current.useful is None or key in current.useful:
                _accumulate(leaf, grad, create_graph)
        for tensor, place in capture:
            if current.captures[place] is not None:
                _keep_grad(tensor, current.captures[place], create_graph)


def _capture(
    current: _Pass, inputs: Sequence[Any], roots: Sequence[Edge]
) -> list[tuple[Any, tuple[int, int]]]:
    """Ask for the gradients of ``inputs`` alone; returns where those of computed ones will be."""
    found = []
    targets: set[int] = set()
    for tensor in inputs:
        node = tensor.current_node()
        if node is None:
            targets.add(id(tensor))
            continue
        targets.add(id(node))
        key = (id(node), tensor.output_index)
        current.captures[key] = None
        found.append((tensor, key))
    current.useful = useful_for(roots, targets)
    return found


def _accumulate(leaf: Any, grad: Any, create_graph: bool) -> None:
    grad = _leaf_hooks(leaf, grad)
    if leaf.grad is None:
        exclusive = sys.getrefcount(grad) <= 4 and sys.getrefcount(grad.storage) <= 2
        if create_graph or (exclusive and _lies_well(grad.type, leaf.type)):
            leaf.grad = grad
        elif leaf.type.device != "cpu" and leaf.type.dense:
            leaf.grad = empty_of(leaf.type).copy_(grad)
        else:
            leaf.grad = grad.clone()
    elif create_graph:
        leaf.grad = add(leaf.grad, grad)
    else:
        leaf.grad.add_(grad)
    for hook in list((leaf.after_hooks or {}).values()):
        hook(leaf)


def _lies_well(grad: TensorType, leaf: TensorType) -> bool:
    """Whether a gradient can be a leaf's own as it lies: on a GPU in the leaf's order of memory, so
    that an optimizer's kernels read lines of both."""
    if leaf.device == "cpu" or not leaf.dense:
        return grad.dense
    return grad.strides == leaf.strides or (grad.contiguous and leaf.contiguous)


def _keep_grad(tensor: Any, grad: Any, create_graph: bool) -> None:
    """Add to the ``grad`` of a computed tensor."""
    held = tensor.grad
    tensor.grad = (grad if create_graph else grad.clone()) if held is None else add(held, grad)


def _leaf_hooks(leaf: Any, grad: Any) -> Any:
    """What a leaf's hooks make of its gradient; those of computed tensors ran with the node."""
    if leaf.hooks:
        for hook in list(leaf.hooks.values()):
            changed = hook(grad)
            if changed is not None:
                grad = _checked(changed, grad)
    return grad


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
    found = []
    with set_grad_enabled(create_graph), _in_forward_types():
        seeds = [(edge_of(t), _seed(t, g)) for t, g in zip(outputs, gradients, strict=True)]
        capture = {id(t): key for t, key in _capture(current, inputs, [e for e, _ in seeds])}
        for edge, gradient in seeds:
            current.give(edge, gradient)
        del seeds
        current.run(keep)
        leaves = {key: _leaf_hooks(leaf, total) for key, (leaf, total) in current.leaves.items()}
    for position, tensor in enumerate(inputs):
        key = capture.get(id(tensor))
        result = current.captures[key] if key else leaves.get(id(tensor))
        if result is None and not allow_unused:
            raise GradientError(
                f"grad: input {position} was not used to compute the outputs; pass "
                "allow_unused=True to get None for it"
            )
        found.append(result)
    return found
