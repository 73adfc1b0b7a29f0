"""PyTorch's operator database under autocast: of what dtype is each result?

PyTorch answers for CUDA with fake tensors, which have types and no memory, so no GPU is needed. An
entry that differs on purpose stands in KNOWN with its reason, and must differ.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import flame

from . import database

LIMIT: Final = 2  # samples of each dtype
LEAST: Final = 480  # entries
ENTRIES: Final = {
    database.full_name(e): e
    for e in database.op_db
    if database.function_of(e) is not None and torch.float32 in e.supported_dtypes("cpu")
}
KNOWN: Final[dict[str, str]] = {
    "__rdiv__": "our stand-in divides y by x; PyTorch's method multiplies by 1 / x",
}
# Not the same memory, or a part of the function that FLAME has not: said by other tests.
LEFT_OUT: Final = frozenset(
    {
        "as_strided.partial_views", "linalg.matrix_norm", "linalg.matrix_power", "linalg.norm",
        "linalg.norm.subgradients_at_zero", "norm.nuc",
    }
)  # fmt: skip

# What PyTorch cannot tell of without numbers, or without a device.
UNANSWERED: Final = frozenset(
    {
        "__getitem__", "allclose", "argwhere", "combinations", "corrcoef", "cov", "equal", "item",
        "masked_select", "nn.functional.binary_cross_entropy", "nn.functional.gaussian_nll_loss",
        "nn.functional.triplet_margin_with_distance_loss", "nn.functional.unfold", "nonzero",
        "uniform", "unique", "unique_consecutive",
    }
)  # fmt: skip


def _fake(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return torch.device("cuda") if isinstance(x, torch.device) else x


def _dtypes(x: Any) -> list[str]:
    return [str(t.dtype).rpartition(".")[2] for t in database.tensors_in(x)]


def _on_cuda(entry: Any, arguments: Any) -> list[str] | None:
    """The dtypes of PyTorch's results; None where it cannot tell without a device or data."""
    with FakeTensorMode():
        input_, args, kwargs = tree_map(_fake, arguments)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            return _dtypes(entry.op(input_, *args, **kwargs))
        except Exception:  # noqa: BLE001 - whatever stands in its way, there is no answer
            return None
        finally:
            torch.set_autocast_enabled("cuda", False)


def _differences(entry: Any) -> tuple[int, list[str]]:
    """How often PyTorch gave an answer, and where FLAME gives another."""
    function = database.function_of(entry)
    assert function is not None
    answers, found = 0, []
    for sample in database.samples_of(entry, torch.float32, LIMIT):
        for dtype in (torch.float32, torch.bfloat16):

            def given(x: Any, dtype: torch.dtype = dtype) -> Any:
                if not isinstance(x, torch.Tensor):
                    return x
                return x.detach().to(dtype) if x.dtype is torch.float32 else x.detach()

            arguments = tree_map(given, (sample.input, sample.args, sample.kwargs))
            wanted = _on_cuda(entry, arguments)
            if wanted is None:
                continue
            ours = SimpleNamespace(input=arguments[0], args=arguments[1], kwargs=arguments[2])
            try:
                operands, options, _ = database.prepared(ours)
            except database.Unconvertible:
                continue
            with flame.autocast("cpu", dtype=flame.bfloat16):
                made = _dtypes(function(*operands, **options))
            answers += 1
            if made != wanted:
                found.append(f"{database.describe(ours)}: {made}, expected {wanted}")
    return answers, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in LEFT_OUT])
def test_entry(name: str) -> None:
    answers, differences = _differences(ENTRIES[name])
    assert (answers == 0) == (name in UNANSWERED)
    if name in UNANSWERED:
        pytest.skip("PyTorch gives no answer without a device or data")
    if name in KNOWN:
        assert differences, f"{name} agrees with PyTorch now; take it from the list of differences"
        pytest.skip(f"differs: {KNOWN[name]}")
    assert not differences, differences[0]


def test_the_lists_name_entries() -> None:
    assert KNOWN.keys() | LEFT_OUT | UNANSWERED <= ENTRIES.keys()
    assert len(ENTRIES) >= LEAST
