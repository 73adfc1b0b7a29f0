"""Programs of a GPU on disk: a second process compiles nothing."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

import flame
from flame import nn, optim
from flame.compiler import program_store
from flame.compiler.gpu import program as gpu_program
from flame.core.errors import CompileError
from flame.runtime.cuda import modules

pytestmark = pytest.mark.cuda


def _losses(steps: int) -> list[float]:
    flame.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Dropout(0.2), nn.Linear(8, 3)).cuda()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)

    @flame.compile
    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    x, y = flame.arange(5, device="cuda"), flame.tensor([0, 1, 2, 0, 1], device="cuda")
    return [step(x, y).item() for _ in range(steps)]


@pytest.mark.usefixtures("eager_cuda")
def test_kernels_are_compiled_beside_the_plans_of_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, compile_many = [], modules.compile_many

    def aside(device: int, requests: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        compiled.append(len(requests))
        compile_many(device, requests)

    monkeypatch.setattr(modules, "compile_many", aside)
    x = flame.arange(6.0, device="cuda").reshape(2, 3)
    flame.compile(lambda x: (x @ x.T).exp().cumsum(0))(x)
    assert compiled
    compiled.clear()
    flame.compile(lambda x: x.cumsum(1))(x)  # no library has a part in it
    assert not compiled


@pytest.mark.usefixtures("eager_cuda")
def test_kernels_that_do_not_compile_beside_libraries_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(device: int, requests: Any) -> None:
        raise CompileError("no text is right today")

    monkeypatch.setattr(modules, "compile_many", failing)
    x = flame.arange(6.0, device="cuda").reshape(2, 3)
    with pytest.raises(CompileError, match="no text is right today"):
        flame.compile(lambda x: (x @ x.T).exp().cumsum(0))(x)


@pytest.mark.usefixtures("eager_cuda")
def test_a_kept_program_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(
        program_store, "write", lambda key, value: bool(kept.setdefault(key, pickle.dumps(value)))
    )
    monkeypatch.setattr(program_store, "read", lambda key: None)
    built = _losses(3)
    assert kept  # it could be kept
    monkeypatch.setattr(program_store, "read", lambda key: pickle.loads(kept[key]))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a program was built")

    monkeypatch.setattr(gpu_program.GpuProgram, "build", refuse)
    assert _losses(3) == built


@pytest.mark.usefixtures("eager_cuda")
def test_an_index_out_of_range_is_told_by_a_kept_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(
        program_store, "write", lambda key, value: bool(kept.setdefault(key, pickle.dumps(value)))
    )
    monkeypatch.setattr(
        program_store, "read", lambda key: pickle.loads(kept[key]) if key in kept else None
    )
    for _ in range(2):
        weight = flame.ones(3, 2, device="cuda")

        @flame.compile
        def pick(index: Any, weight: Any = weight) -> Any:
            return weight[index]

        assert pick(flame.tensor([0, 2], device="cuda")).shape == (2, 2)
        with pytest.raises(IndexError, match="7"):
            pick(flame.tensor([0, 7], device="cuda")).cpu()
    assert len(kept) == 1
