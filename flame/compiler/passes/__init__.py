"""Graph -> Graph: each pass a file, in the order in which they run, with the reason for its place.

Every pass is a pure function, near linear in the number of nodes. With FLAME_VERIFY=1 the graph is
verified after each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from flame.compiler.passes.activated import activated
from flame.compiler.passes.assemble import assemble
from flame.compiler.passes.blocks import blocks
from flame.compiler.passes.canonicalize import canonicalize
from flame.compiler.passes.cse import cse
from flame.compiler.passes.dead import dead
from flame.compiler.passes.epilogues import epilogues
from flame.compiler.passes.fold import fold
from flame.compiler.passes.layout import layout
from flame.compiler.passes.modulated import modulated
from flame.compiler.passes.narrow import narrow
from flame.compiler.passes.order import order
from flame.compiler.passes.pieces import pieces
from flame.compiler.passes.products import products
from flame.compiler.passes.readable import readable
from flame.compiler.passes.recompute import recompute
from flame.compiler.passes.release import release
from flame.compiler.passes.simplify import simplify
from flame.core.errors import CompileError
from flame.graph import Graph

Pass = Callable[[Graph], Graph]

PREPARING: Final[tuple[Pass, ...]] = (
    dead,  # the tape records much that nobody reads, and no pass should look at it
    fold,
    canonicalize,  # copies that copy nothing hide what a convolution reads
    layout,  # before `assemble`, which writes in the layout that is wanted
)
# Repeated while they change anything.
SIMPLIFYING: Final[tuple[Pass, ...]] = (
    dead,
    fold,  # numbers, before the rules that look for 0, 1 and -1
    canonicalize,  # one form of everything, before equal nodes are looked for
    simplify,
    assemble,  # sums of gradients of parts, once no zeros are added any more
    products,  # sums of products, which simplify has turned the same way
    cse,
)
FINISHING: Final[tuple[Pass, ...]] = (
    dead,
    blocks,  # before the passes that look for products, and for what an op was given
    modulated,  # nodes have found their simplest form, and all of them are there
    epilogues,  # products have found their final form
    activated,  # before `narrow`, as it looks for an op and for what its gradient was given
    dead,  # what became a part of another node
    release,  # what is computed twice on purpose may look equal from here on
    recompute,  # no cse may follow, which would merge both computations again
    pieces,  # once it is known who reads what
    narrow,  # leaves copies that nobody reads any more; no pass that infers types may follow
    dead,  # those, and views of what is not kept any more
    readable,  # adds copies, so after all that changes layouts
    order,  # last: it needs all nodes, and a schedule keeps the order
)
ALL: Final = tuple(dict.fromkeys((*PREPARING, *SIMPLIFYING, *FINISHING)))
ROUNDS: Final = 4


def optimize(graph: Graph) -> Graph:
    """The graph after all passes: the same results, by fewer and better nodes."""
    for step in PREPARING:
        graph = run(step, graph)
    for _ in range(ROUNDS):
        before = graph.nodes
        for step in SIMPLIFYING:
            graph = run(step, graph)
        if graph.nodes == before:  # the same objects
            break
    for step in FINISHING:
        graph = run(step, graph)
    return graph


def run(step: Pass, graph: Graph) -> Graph:
    """One pass, with its result verified where that is asked for."""
    made = step(graph)
    if os.environ.get("FLAME_VERIFY") == "1":
        try:
            made.verify()
        except CompileError as error:
            error.add_note(f"after the pass {step.__name__}")
            raise
    return made
