"""Loading many kernels at once, and the layout of parallel regions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import flame  # noqa: F401 - gives the ops their interpreter
from flame.compiler.blueprint import StepPlan
from flame.compiler.pipeline import source_of
from flame.compiler.regions import Piece, arrange
from flame.core import dtypes
from flame.core.errors import CompileError, FlameError
from flame.core.types import tensor_type
from flame.graph import infer
from flame.kernel.identity import kernel_identity
from flame.ops.elementwise import Elementwise
from flame.ops.op import OPS
from flame.runtime.cpu.cache import DiskCache
from flame.runtime.cpu.emission import emit, new_machine, over_machines
from flame.runtime.cpu.executor_text import HOST, INLINE, PARALLEL, REGION
from flame.runtime.cpu.jit import Compiler


def text(name: str, number: int) -> tuple[str, str]:
    return f"define i64 @{name}() {{\n  ret i64 {number}\n}}\n", name


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Compiler]:
    return Compiler(DiskCache(tmp_path))


def test_many_texts_are_compiled_once_each(compiler: Compiler, tmp_path: Path) -> None:
    sources = [text(f"many_{i}", i) for i in range(20)]
    first = compiler.load_many([*sources, sources[3]])
    assert len(set(first)) == 20
    assert first[20] == first[3]
    assert (compiler.statistics.compiled, compiler.statistics.disk_hits) == (20, 0)
    assert compiler.load_many(sources[5:8]) == first[5:8]
    assert compiler.load(sources[0][0], ("many_0",)) == (first[0],)
    assert compiler.statistics.compiled == 20
    other = Compiler(DiskCache(tmp_path))
    other.load_many(sources)
    assert (other.statistics.compiled, other.statistics.disk_hits) == (0, 20)
    assert other.load_many([]) == []


def test_a_refused_text_among_many_is_named(compiler: Compiler) -> None:
    broken = ("define i64 @broken() {\n  ret i32 1\n}\n", "broken")
    with pytest.raises(CompileError, match="broken"):
        compiler.load_many([text("fine_1", 1), broken, text("fine_2", 2)])


def test_code_from_several_threads_is_the_same(compiler: Compiler) -> None:
    from llvmlite import binding

    def work(machine: object, number: int) -> bytes:
        source = compiler._target + text(f"same_{number}", number)[0]
        return emit(machine, binding.parse_assembly(source, binding.create_context()))

    machines = [new_machine(compiler.cpu_name, compiler.cpu_features) for _ in range(4)]
    numbers = list(range(60))
    assert over_machines(machines, work, numbers) == over_machines(machines[:1], work, numbers)


def step(n: int, grain: int = 4, *, group: int = 1, scratch: int = 0, **options: int) -> StepPlan:
    used = ((0, scratch),) if scratch else ()
    given = {"task": 0, "stage": 0, "kernel": 0, "error": -1, **options}
    first = 10 * n
    return StepPlan(
        group=group, words=(first, first + 4), n=n, grain=grain, scratch=used, work=n / grain,
        **given,
    )  # fmt: skip


def test_one_thread_runs_step_by_step() -> None:
    layout = arrange([step(1), step(100), step(3)], 1)
    assert [s.kind for s in layout.steps] == [INLINE] * 3


def test_little_work_is_not_shared() -> None:
    assert [s.kind for s in arrange([step(1), step(1)], 4).steps] == [INLINE, INLINE]
    assert [s.kind for s in arrange([step(1), step(1, group=2)], 4).steps] == [INLINE, INLINE]


def test_a_region_covers_every_iteration_once() -> None:
    steps = [step(n) for n in (1, 2, 1000, 3, 4, 5, 17)]
    layout = arrange(steps, 3)
    (region,) = layout.steps
    assert region.kind == REGION
    assert region.members == tuple(range(7))
    seen: dict[int, list[Piece]] = {}
    for chunk in region.chunks:
        for piece in chunk:
            seen.setdefault(piece.plan, []).append(piece)
    for i, plan in enumerate(steps):
        pieces = sorted(seen[i], key=lambda p: p.begin)
        assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])]
        assert pieces[-1].end == plan.n


def test_what_can_fail_and_host_calls_stand_alone() -> None:
    layout = arrange([step(100), step(100, error=0), step(100), step(100, kernel=-2)], 2)
    assert [s.kind for s in layout.steps] == [PARALLEL, PARALLEL, PARALLEL, HOST]


def test_scratch_memory_of_a_region_lies_apart() -> None:
    layout = arrange([step(8, scratch=100), step(9, scratch=50), step(5, group=2, scratch=10)], 2)
    assert layout.scratch == 256 + 128
    assert layout.scratch_offsets == {80: 0, 90: 256, 50: 0}


def test_the_identity_of_kernels_goes_with_their_texts() -> None:
    """Over the kernels of many ops: equal identities have equal texts."""
    shapes = [(3, 4), (64, 128), (3, 1)]
    texts: dict[object, str] = {}
    kernels = 0
    for kind in (dtypes.float32, dtypes.float64, dtypes.int64):
        for shape in shapes:
            type_ = tensor_type(kind, shape)
            for op in OPS.values():
                if not isinstance(op, Elementwise) or len(op.inputs) > 2:
                    continue
                try:
                    lowering = op.lower(
                        (type_,) * len(op.inputs), infer(op, (type_,) * len(op.inputs), {})
                    )
                except (FlameError, TypeError):
                    continue
                for bound in lowering.kernels[:1]:
                    kernels += 1
                    text = source_of(bound.kernel).text
                    assert texts.setdefault(kernel_identity(bound.kernel), text) == text
    assert kernels > 500
    assert len(set(texts.values())) == len(texts) < kernels
