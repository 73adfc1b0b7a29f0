"""A large product that a loss reads alone is computed in blocks of rows.

    scores = x @ w;  loss = cross_entropy(scores, y)
    d = its gradient;  dx = d @ w.T;  dw = x.T @ d

All of that is done for the first rows, then for the next ones: the losses are added up, the rows of
dx joined, the products that make dw added. The scores of a language model for its vocabulary are
often its largest tensor by far, and so only a part of them is there at a time.

Only where most memory is in use while the scores are there, and where the gradient that comes in
does not wait for the loss. It costs the reading of a dw for each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from flame.core import dtypes
from flame.graph import Graph, Node, Operand, Rewriter, Symbol, Uses, tensor_of
from flame.graph.liveness import Liveness
from flame.graph.rewriter import tensor_symbol
from flame.ops.cross_entropy import cross_entropy_backward, cross_entropy_op
from flame.ops.op import OPS

BLOCKS: Final = 4
ROWS: Final = 128  # a block is so many rows, once or many times: what products like
LEAST: Final = 1 << 28  # bytes of the scores from which it pays
SHARE: Final = 1 / 16  # of all memory in use


def blocks(graph: Graph) -> Graph:
    if all(node.op is not cross_entropy_op for node in graph.nodes):
        return graph
    finder = _Finder(graph)
    for node in graph.nodes:
        head = finder.head(node) if node.op is cross_entropy_op else None
        early = None if head is None else finder.early(head)
        if head is not None and early is not None and finder.pays(head):
            return _Blocks(graph, head, early).run()
    return graph


@dataclass
class _Head:
    """The nodes around a loss. before: copies and views that lead from the product to the scores.
    after: those behind the gradient, in order. ends: the nodes that read the gradient at last, each
    with how its blocks become one: by ``rows`` or by ``sum``."""

    product: Node
    before: list[Node]
    loss: Node
    backward: Node
    after: list[Node] = field(default_factory=list)
    ends: dict[Node, str] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[Node, ...]:
        inner = (*self.before, self.loss, self.backward, *self.after)
        return (self.product, *inner, *self.ends)


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.uses = graph, Uses.of(graph)
        self.position = {node: i for i, node in enumerate(graph.nodes)}

    def head(self, loss: Node) -> _Head | None:
        """What surrounds a loss, where it has the form that blocks need."""
        scores, target, weight = loss.inputs
        made, log_sum, total = loss.outputs
        assert isinstance(scores, Symbol)
        if weight is not None or loss.attributes["reduction"] == "none":
            return None
        if tensor_of(scores).ndim != 2 or tensor_of(made).dtype.bits < 32:
            return None
        backward = self._only_beside(scores, loss)
        if backward is None or backward.op is not cross_entropy_backward:
            return None
        if backward.inputs[1:] != (scores, target, None, log_sum, total):
            return None
        if backward.attributes != loss.attributes or self.uses.only(log_sum) is not backward:
            return None
        if total in self.uses.results or self.uses.of_symbol(total) != [backward]:
            return None
        before = self._before(scores)
        if before is None:
            return None
        product, *between = before
        head = _Head(product, between, loss, backward)
        return head if self._after(head, backward.outputs[0]) and head.ends else None

    def _only_beside(self, symbol: Symbol, reader: Node) -> Node | None:
        """The one other node that reads a symbol."""
        others = [node for node in self.uses.of_symbol(symbol) if node is not reader]
        return others[0] if len(others) == 1 and symbol not in self.uses.results else None

    def _before(self, scores: Symbol) -> list[Node] | None:
        """The nodes that make the scores, from the product on."""
        found: list[Node] = []
        symbol = scores
        while True:
            maker = self.uses.makers.get(symbol)
            if maker is None or (symbol is not scores and self.uses.only(symbol) is None):
                return None
            found.insert(0, maker)
            if maker.op.name in ("matmul", "linear"):
                break
            if not _keeps_rows(maker):
                return None
            (symbol,) = maker.symbols
        x, w = (tensor_of(s) for s in found[0].symbols[:2])
        fits = (
            w.ndim == 2 <= x.ndim and x.contiguous and x.shape[:-1] == tensor_of(symbol).shape[:-1]
        )
        return found if fits else None

    def _after(self, head: _Head, gradient: Symbol, *, turned: bool = False) -> bool:
        """Find who reads the gradient; whether all of them can do so by blocks."""
        if gradient in self.uses.results:
            return False
        for reader in self.uses.of_symbol(gradient):
            turns = reader.op is OPS["permute"] and tensor_of(gradient).ndim == 2
            if not turned and (turns or _keeps_rows(reader)):
                head.after.append(reader)
                if not self._after(head, reader.outputs[0], turned=turns):
                    return False
                continue
            how = _joined_by(reader, gradient, turned=turned)
            if how is None:
                return False
            head.ends[reader] = how
        return True

    def pays(self, head: _Head) -> bool:
        """Whether the scores are large, and there while most memory is in use."""
        memory = Liveness(self.graph)
        (made,) = head.product.outputs
        profile = memory.profile()
        peak = profile.index(max(profile))
        last = max(self.position[node] for node in head.ends)
        nbytes = memory.bytes_of(made)
        during = self.position[head.product] <= peak <= last
        return during and nbytes >= max(LEAST, SHARE * profile[peak])

    def early(self, head: _Head) -> set[Node] | None:
        """What has to be computed before the blocks, as they read it; None where it depends on
        what all of them give together."""
        inside = set(head.nodes)
        local = {s for node in inside - head.ends.keys() for s in node.outputs}
        local.remove(head.loss.outputs[0])
        found: set[Node] = set()
        waiting = [s for node in inside for s in node.symbols if s not in local]
        while waiting:
            symbol = waiting.pop()
            maker = self.uses.makers.get(symbol)
            if maker in inside:
                return None
            if maker is not None and maker not in found:
                found.add(maker)
                waiting += maker.symbols
        return found


def _keeps_rows(node: Node) -> bool:
    """Whether a node is a conversion, or a reshape that leaves the last dimension."""
    if node.op is OPS["copy"]:
        return tensor_of(node.outputs[0]).contiguous
    if node.op is not OPS["view"]:
        return False
    (source,) = node.symbols
    before, after = tensor_of(source), tensor_of(node.outputs[0])
    return before.contiguous and after.contiguous and before.shape[-1:] == after.shape[-1:]


def _joined_by(node: Node, gradient: Symbol, *, turned: bool) -> str | None:
    """How what a node computes for blocks of a gradient becomes what it computes for the whole.
    turned: the rows are the columns of this gradient."""
    flat = tensor_of(gradient).ndim == 2
    if node.op is OPS["sum"] and node.attributes["dims"] == (0,):
        return "sum" if flat and not turned else None
    if node.op.name != "matmul" or node.symbols.count(gradient) != 1:
        return None
    left = node.symbols[0] is gradient
    if tensor_of(node.symbols[1 if left else 0]).ndim != 2:
        return None
    if left and not turned:
        return "rows"
    # the other product sums over the rows
    return "sum" if flat and left is turned else None


class _Blocks:
    """The graph with a head in blocks."""

    def __init__(self, graph: Graph, head: _Head, early: set[Node]) -> None:
        self.graph, self.head, self.early = graph, head, early
        self.rewriter = Rewriter(graph)
        self.rows, self.classes = tensor_of(head.loss.inputs[0]).shape

    def run(self) -> Graph:
        inside, done = set(self.head.nodes), set[Node]()
        for node in self.graph.nodes:
            if node is self.head.product:
                for other in self.graph.nodes:
                    if other in self.early and other not in done:
                        self.rewriter.keep(other)
                        done.add(other)
                self._compute()
            elif node not in inside and node not in done:
                self.rewriter.keep(node)
                done.add(node)
        return self.rewriter.done()

    def _compute(self) -> None:
        head = self.head
        step = -(-self.rows // BLOCKS)
        step = -(-step // ROWS) * ROWS
        rows: dict[Symbol, list[Symbol]] = {}
        sums: dict[Symbol, Symbol] = {}
        slope, total = self._slope()
        (loss, *_) = head.loss.outputs
        for start in range(0, self.rows, step):
            for symbol, made, how in self._block(start, min(start + step, self.rows), slope):
                if how == "rows":
                    rows.setdefault(symbol, []).append(made)
                else:
                    sums[symbol] = self._added(sums.get(symbol), made)
        for symbol, parts in rows.items():
            self._put(symbol, self._joined(parts, symbol))
        if total is not None:
            sums[loss] = self.rewriter.emit(OPS["div"], (sums[loss], total), {}, like=loss)
        for symbol, made in sums.items():
            self._put(symbol, self._narrowed(made, symbol))

    def _put(self, old: Symbol, new: Symbol) -> None:
        self.rewriter.replace(old, self.rewriter.laid_out(new, tensor_of(old)))

    def _slope(self) -> tuple[Operand, Symbol | None]:
        """The gradient of the sum of losses, and what a mean divides it by."""
        rewriter, loss = self.rewriter, self.head.loss
        slope = rewriter.now(self.head.backward.inputs[0])
        if loss.attributes["reduction"] == "sum":
            return slope, None
        target, like = tensor_symbol(rewriter.now(loss.inputs[1])), loss.outputs[2]
        if tensor_of(target).dtype is not dtypes.int64:  # which may not hold the number to ignore
            whole = {"dtype": dtypes.int64}
            target = rewriter.emit(OPS["copy"], (target,), whole, like=target)
        counts = rewriter.emit(OPS["ne"], (target, loss.attributes["ignore_index"]), {}, like=like)
        numbers = rewriter.emit(OPS["copy"], (counts,), {"dtype": tensor_of(like).dtype}, like=like)
        total = rewriter.emit(OPS["sum"], (numbers,), {"dims": (0,), "keepdim": False}, like=like)
        return rewriter.emit(OPS["div"], (slope, total), {}, like=like), total

    def _block(self, start: int, stop: int, slope: Operand) -> Iterator[tuple[Symbol, Symbol, str]]:
        """Computes a block; gives what it adds to symbols of the old graph, and how."""
        head, rewriter = self.head, self.rewriter

        def part(operand: Operand, dim: int = 0) -> Symbol:
            symbol = tensor_symbol(rewriter.now(operand))
            if tensor_of(symbol).ndim > 2:
                shape = (self.rows, tensor_of(symbol).shape[-1])
                symbol = rewriter.emit(OPS["view"], (symbol,), {"shape": shape}, like=symbol)
            attributes = {"dim": dim, "start": start, "stop": stop, "step": 1}
            return rewriter.emit(OPS["slice"], (symbol,), attributes, like=symbol)

        def follow(node: Node, block: Symbol) -> Symbol:
            """A conversion or a transpose of a block; reshapes leave it as it is."""
            if node.op is OPS["view"]:
                return block
            return rewriter.emit(node.op, (block,), node.attributes, like=node.outputs[0])

        x, *others = head.product.inputs
        inputs = (part(x), *map(rewriter.now, others))
        scores = rewriter.emit(head.product.op, inputs, {}, like=head.product.outputs[0])
        for node in head.before:
            scores = follow(node, scores)
        target = part(head.loss.inputs[1])
        options = {**head.loss.attributes, "reduction": "sum"}
        inputs = (scores, target, None)
        like, line = head.loss.outputs[0], head.loss.line
        loss = rewriter.emit(cross_entropy_op, inputs, options, like=like, line=line)
        _, log_sum, total = rewriter.nodes[-1].outputs
        yield head.loss.outputs[0], loss, "sum"
        (gradient,) = head.backward.outputs
        operands = (slope, scores, target, None, log_sum, total)
        made = rewriter.emit(
            cross_entropy_backward, operands, options, like=gradient, line=head.backward.line
        )
        known = {gradient: made}
        for node in head.after:
            known[node.outputs[0]] = follow(node, known[node.symbols[0]])
        for node, how in head.ends.items():
            (like,) = node.outputs
            if node.op is OPS["sum"]:
                yield like, self._column_sums(known[node.symbols[0]], like), how
                continue
            sides = list(node.inputs)
            for i, operand in enumerate(node.inputs):
                assert isinstance(operand, Symbol)
                if operand in known:
                    sides[i] = known[operand]
                elif how == "rows":
                    sides[i] = rewriter.now(operand)
                else:  # the rows of the other factor
                    sides[i] = part(operand, dim=1 - i)
            made = rewriter.emit(node.op, tuple(sides), node.attributes, like=like, line=node.line)
            yield like, made, how

    def _column_sums(self, block: Symbol, like: Symbol) -> Symbol:
        """As a product: sums would be fused with those of the other blocks, and so keep all of
        them until the last."""
        rewriter, type_ = self.rewriter, tensor_of(block)
        ones = {"shape": (1, type_.shape[0]), "dtype": type_.dtype, "device": type_.device}
        one = rewriter.emit(OPS["full"], (1,), ones, like=like)
        made = rewriter.emit(OPS["matmul"], (one, block), {}, like=like)
        if tensor_of(like).ndim == 1:
            shape = {"shape": type_.shape[1:]}
            made = rewriter.emit(OPS["view"], (made,), shape, like=like)
        return made

    def _added(self, total: Symbol | None, part: Symbol) -> Symbol:
        """A running sum, of half-width floats in float32: what waited until the end to be widened
        would keep its block."""
        rewriter = self.rewriter
        if tensor_of(part).dtype.bits < 32:
            wide = {"dtype": dtypes.float32}
            part = rewriter.emit(OPS["copy"], (part,), wide, like=part)
        return part if total is None else rewriter.emit(OPS["add"], (total, part), {}, like=part)

    def _narrowed(self, total: Symbol, like: Symbol) -> Symbol:
        dtype = tensor_of(like).dtype
        if tensor_of(total).dtype is dtype:
            return total
        return self.rewriter.emit(OPS["copy"], (total,), {"dtype": dtype}, like=like)

    def _joined(self, parts: list[Symbol], like: Symbol) -> Symbol:
        made = self.rewriter.emit(OPS["cat"], tuple(parts), {"dim": 0}, like=like)
        shape = tensor_of(like).shape
        if tensor_of(made).shape != shape:
            made = self.rewriter.emit(OPS["view"], (made,), {"shape": shape}, like=like)
        return made
