"""The flow from a recorded step to a program, one verb and one noun a stage.

graph    = optimize(graph)          Graph -> Graph, see `flame.compiler.passes`
schedule = fuse(graph)              which nodes run together, as kernels
program  = Program.build(schedule)  memory, machine code, one native call

A program that an earlier process kept on disk is taken from there instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flame.compiler.passes import optimize
from flame.compiler.program import Program
from flame.compiler.program_key import program_key
from flame.compiler.schedule import Schedule
from flame.compiler.schedule.fusion import fuse
from flame.compiler.schedule.task import owners_of
from flame.core.errors import TraceError
from flame.core.types import TensorType
from flame.graph import Graph, Node, Symbol
from flame.ops.conversion import copy

if TYPE_CHECKING:
    from flame.compiler.gpu.program import GpuProgram


def compile_graph(graph: Graph, state: Mapping[Symbol, int]) -> Program | GpuProgram:
    """The program of a graph; ``state``: addresses of the inputs that stay where they are."""
    device = gpu_of(graph)
    if device is not None:
        return _on_gpu(graph, state, device)
    key = program_key(graph)
    program = Program.restore(key, graph, state)
    if program is None:
        started = time.perf_counter()
        schedule = schedule_of(graph)
        planned = time.perf_counter() - started
        program = Program.build(schedule, state)
        program.stages = {"passes and fusion": planned, **program.stages}
        program.save(key)
    return program


def _on_gpu(graph: Graph, state: Mapping[Symbol, int], device: str) -> GpuProgram:
    from flame.compiler.gpu.program import GpuProgram, identity

    key = program_key(graph, *identity(device))
    program = GpuProgram.restore(key, graph, state)
    if program is None:
        started = time.perf_counter()
        schedule = schedule_of(graph)
        planned = time.perf_counter() - started
        program = GpuProgram.build(schedule, state, device)
        program.stages = {"passes and fusion": planned, **program.stages}
        program.save(key)
    return program


def gpu_of(graph: Graph) -> str | None:
    """The GPU that a graph computes on; None for one of the CPU alone. Raises TraceError for a
    graph on several GPUs."""
    symbols = [*graph.inputs, *graph.constants, *(s for n in graph.nodes for s in n.outputs)]
    found = {s.type.device for s in symbols if isinstance(s.type, TensorType)} - {"cpu"}
    if len(found) > 1:
        raise TraceError(
            f"a compiled step computes on {' and '.join(sorted(found))}; compile a step for each"
        )
    return found.pop() if found else None


def schedule_of(graph: Graph) -> Schedule:
    """The graph optimized and divided into tasks."""
    return fuse(set_apart(optimize(graph)))


def set_apart(graph: Graph) -> Graph:
    """Copies where results would share their memory with inputs, constants, or each other.

    What a step returns is the caller's own, whatever an optimization found to be equal.
    """
    owners = owners_of(graph)
    taken: set[Symbol] = {*graph.inputs, *graph.constants}
    copies: list[Node] = []

    def own(symbol: Symbol) -> Symbol:
        owner = owners.get(symbol, (symbol, 0))[0]
        if owner not in taken:
            taken.add(owner)
            return symbol
        assert isinstance(symbol.type, TensorType)
        made = Symbol(f"{symbol.name}_copy{len(copies)}", symbol.type)
        copies.append(Node(copy, (symbol,), (made,), {}))
        return made

    # an input that nothing changes may be its own new value: no copy, no update
    updates = [(old, new) for old, new in graph.updates if new is not old]
    outputs = tuple([own(s) for s in graph.outputs])
    changed = tuple([(old, own(new)) for old, new in updates])
    return Graph(graph.inputs, (*graph.nodes, *copies), outputs, changed, graph.constants)
