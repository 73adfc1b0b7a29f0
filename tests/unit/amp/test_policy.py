"""Which precision each function runs in: PyTorch's table for CUDA, and its results on the CPU.

PyTorch itself is asked about CUDA: its fake tensors say of what dtype a result would be on a device
that is not there. (`tests/ops/test_autocast_database.py` asks about every function that there is.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch._subclasses.fake_tensor import FakeTensorMode

import flame
import flame.nn.functional as F

Call = Callable[[Any, Any], Any]  # of the operands' maker, and of the library with its functional


class Library:
    """Either library under one set of names."""

    def __init__(self, root: Any, functional: Any) -> None:
        self.root, self.F = root, functional


OURS, THEIRS = Library(flame, F), Library(torch, TF)

LOWER: dict[str, Call] = {
    "matmul": lambda t, m: t(3, 4) @ t(4, 5),
    "mm": lambda t, m: m.root.mm(t(3, 4), t(4, 5)),
    "bmm": lambda t, m: m.root.bmm(t(2, 3, 4), t(2, 4, 5)),
    "mv": lambda t, m: m.root.mv(t(3, 4), t(4)),
    "addmm": lambda t, m: m.root.addmm(t(3, 5), t(3, 4), t(4, 5)),
    "addmv": lambda t, m: m.root.addmv(t(3), t(3, 4), t(4)),
    "addr": lambda t, m: m.root.addr(t(3, 4), t(3), t(4)),
    "baddbmm": lambda t, m: m.root.baddbmm(t(2, 3, 5), t(2, 3, 4), t(2, 4, 5), beta=0.5),
    "addbmm": lambda t, m: m.root.addbmm(t(3, 5), t(2, 3, 4), t(2, 4, 5)),
    "einsum": lambda t, m: m.root.einsum("bij,bjk->bik", t(2, 3, 4), t(2, 4, 5)),
    "linear": lambda t, m: m.F.linear(t(3, 4), t(5, 4), t(5)),
    "conv1d": lambda t, m: m.F.conv1d(t(2, 3, 8), t(4, 3, 3), t(4)),
    "conv2d": lambda t, m: m.F.conv2d(t(2, 3, 8, 8), t(4, 3, 3, 3), t(4)),
    "conv3d": lambda t, m: m.F.conv3d(t(1, 2, 4, 4, 4), t(3, 2, 3, 3, 3)),
    "conv_transpose2d": lambda t, m: m.F.conv_transpose2d(t(2, 3, 5, 5), t(3, 4, 3, 3), t(4)),
    "attention": lambda t, m: m.F.scaled_dot_product_attention(
        t(2, 2, 5, 8), t(2, 2, 5, 8), t(2, 2, 5, 8)
    ),
    "attention with a mask": lambda t, m: m.F.scaled_dot_product_attention(
        t(2, 2, 5, 8), t(2, 2, 5, 8), t(2, 2, 5, 8), t(5, 5)
    ),
    "vecdot": lambda t, m: m.root.linalg.vecdot(t(3, 4), t(3, 4)),
    "multi_dot": lambda t, m: m.root.linalg.multi_dot([t(3, 4), t(4, 5), t(5, 2)]),
    "prelu": lambda t, m: m.F.prelu(t(3, 4), t(1)),
}

WIDE: dict[str, Call] = {
    **{
        name: lambda t, m, name=name: getattr(m.root, name)(t(3, 4).abs() * 0.2 + 0.1)
        for name in (
            "acos",
            "asin",
            "cosh",
            "erfinv",
            "exp",
            "expm1",
            "log",
            "log10",
            "log2",
            "log1p",
            "reciprocal",
            "rsqrt",
            "sinh",
            "tan",
            "sum",
            "prod",
        )
    },
    "pow": lambda t, m: t(3, 4).abs() ** t(4),
    "pow 2": lambda t, m: t(3, 4) ** 2,
    "pow 3": lambda t, m: t(3, 4) ** 3,
    "pow 0.5": lambda t, m: t(3, 4).abs() ** 0.5,
    "pow of a number": lambda t, m: 2.0 ** t(3, 4),
    "number over": lambda t, m: 1.0 / (t(3, 4).abs() + 1),
    "softplus": lambda t, m: m.F.softplus(t(3, 4)),
    "softmax": lambda t, m: m.F.softmax(t(3, 4), dim=-1),
    "log_softmax": lambda t, m: m.F.log_softmax(t(3, 4), dim=-1),
    "sum of rows": lambda t, m: t(3, 4).sum(1),
    "cumsum": lambda t, m: t(3, 4).cumsum(1),
    "cumprod": lambda t, m: t(3, 4).cumprod(1),
    "logsumexp": lambda t, m: m.root.logsumexp(t(3, 4), 1),
    "norm": lambda t, m: m.root.norm(t(3, 4)),
    "norm of order 3": lambda t, m: m.root.norm(t(3, 4), 3, dim=1),
    "vector_norm": lambda t, m: m.root.linalg.vector_norm(t(3, 4), float("inf")),
    "layer_norm": lambda t, m: m.F.layer_norm(t(3, 4), (4,), t(4), t(4)),
    "group_norm": lambda t, m: m.F.group_norm(t(3, 4, 5), 2, t(4), t(4)),
    "rms_norm": lambda t, m: m.F.rms_norm(t(3, 4), (4,), t(4)),
    "cosine_similarity": lambda t, m: m.F.cosine_similarity(t(3, 4), t(3, 4)),
    "mse_loss": lambda t, m: m.F.mse_loss(t(3, 4), t(3, 4)),
    "l1_loss": lambda t, m: m.F.l1_loss(t(3, 4), t(3, 4)),
    "smooth_l1_loss": lambda t, m: m.F.smooth_l1_loss(t(3, 4), t(3, 4)),
    "huber_loss": lambda t, m: m.F.huber_loss(t(3, 4), t(3, 4)),
    "kl_div": lambda t, m: m.F.kl_div(t(3, 4), t(3, 4).abs(), reduction="sum"),
    "poisson_nll_loss": lambda t, m: m.F.poisson_nll_loss(t(3, 4), t(3, 4).abs()),
    "bce with logits": lambda t, m: m.F.binary_cross_entropy_with_logits(
        t(3, 4), t(3, 4).abs() * 0.1
    ),
    "soft_margin_loss": lambda t, m: m.F.soft_margin_loss(t(3, 4), t(3, 4).sign()),
    "hinge_embedding_loss": lambda t, m: m.F.hinge_embedding_loss(t(3, 4), t(3, 4).sign()),
    "margin_ranking_loss": lambda t, m: m.F.margin_ranking_loss(t(4), t(4), t(4).sign()),
    "triplet_margin_loss": lambda t, m: m.F.triplet_margin_loss(t(3, 4), t(3, 4), t(3, 4)),
    "cross_entropy of probabilities": lambda t, m: m.F.cross_entropy(t(3, 4), t(3, 4).abs()),
    "dist": lambda t, m: m.root.dist(t(3, 4), t(3, 4)),
    "cdist": lambda t, m: m.root.cdist(t(3, 4), t(5, 4)),
    "renorm": lambda t, m: m.root.renorm(t(3, 4), 2, 0, 0.5),
    "nearest": lambda t, m: m.F.interpolate(t(1, 2, 4, 4), scale_factor=2),
    "bilinear": lambda t, m: m.F.interpolate(t(1, 2, 4, 4), scale_factor=2, mode="bilinear"),
}

AS_GIVEN: dict[str, Call] = {
    **{
        name: lambda t, m, name=name: getattr(m.root, name)(t(3, 4).abs())
        for name in ("sqrt", "tanh", "sigmoid", "mean", "var", "exp2", "erf", "amax",
                     "sin", "nansum", "frexp")
    },
    "relu": lambda t, m: m.F.relu(t(3, 4)),
    "gelu": lambda t, m: m.F.gelu(t(3, 4)),
    "silu": lambda t, m: m.F.silu(t(3, 4)),
    "add": lambda t, m: t(3, 4) + t(4),
    "div": lambda t, m: t(3, 4) / (t(4).abs() + 1),
    "cat": lambda t, m: m.root.cat([t(3, 4), t(2, 4)]),
    "stack": lambda t, m: m.root.stack([t(3, 4), t(3, 4)]),
    "batch_norm": lambda t, m: m.F.batch_norm(t(3, 4), None, None, training=True),
    "avg_pool2d": lambda t, m: m.F.avg_pool2d(t(1, 2, 4, 4), 2),
    "max_pool2d": lambda t, m: m.F.max_pool2d(t(1, 2, 4, 4), 2),
    "area": lambda t, m: m.F.interpolate(t(1, 2, 4, 4), size=(2, 2), mode="area"),
    "dot": lambda t, m: m.root.dot(t(4), t(4)),
    "inner": lambda t, m: m.root.inner(t(3, 4), t(2, 4)),
    "tensordot": lambda t, m: m.root.tensordot(t(3, 4), t(4, 2), 1),
    "bilinear layer": lambda t, m: m.F.bilinear(t(3, 4), t(3, 5), t(2, 4, 5), t(2)),
    "trace": lambda t, m: m.root.trace(t(4, 4)),
    "addcmul": lambda t, m: m.root.addcmul(t(3, 4), t(3, 4), t(3, 4)),
    "atan2": lambda t, m: m.root.atan2(t(3, 4), t(3, 4)),
}  # fmt: skip

# PyTorch has another table for the CPU, in which these are lower too.
LOWER_ON_CPU = {"inner", "tensordot", "bilinear layer"}
ALL = {**LOWER, **WIDE, **AS_GIVEN}


class Maker:
    """Makes the operands of a call: standard normal ones, whose dtypes take turns."""

    def __init__(self, library: Any, dtypes: tuple[str, ...], device: str = "cpu") -> None:
        self.library, self.dtypes, self.device = library, dtypes, device
        self.random = np.random.default_rng(0)
        self.count = 0

    def __call__(self, *shape: int) -> Any:
        dtype = self.dtypes[self.count % len(self.dtypes)]
        self.count += 1
        values = self.random.standard_normal(shape, dtype=np.float32)
        if self.library is flame:
            return flame.from_numpy(values).to(getattr(flame, dtype))
        if self.device == "cuda":
            return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        return torch.from_numpy(values).to(getattr(torch, dtype))


def _dtypes(x: Any) -> list[str]:
    if isinstance(x, (tuple, list)):
        return [name for each in x for name in _dtypes(each)]
    return [str(x.dtype).rpartition(".")[2]]


def on_cuda(call: Call, given: tuple[str, ...], dtype: torch.dtype) -> list[str]:
    """The dtypes that PyTorch's results would have on CUDA."""
    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            return _dtypes(call(Maker(torch, given, "cuda"), THEIRS))
        finally:
            torch.set_autocast_enabled("cuda", False)


GIVEN = [("float32",), ("bfloat16",), ("float32", "bfloat16")]


@pytest.mark.parametrize("given", GIVEN, ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("name", ALL)
def test_dtypes_are_those_of_the_table(name: str, given: tuple[str, ...]) -> None:
    call = ALL[name]
    try:
        wanted = on_cuda(call, given, torch.bfloat16)
    except RuntimeError as error:  # what PyTorch does not take in two dtypes
        if len(given) == 1:
            raise
        pytest.skip(f"PyTorch refuses: {str(error)[:60]}")
    with flame.autocast("cpu", dtype=flame.bfloat16):
        found = _dtypes(call(Maker(flame, given), OURS))
    assert found == wanted
    if name in LOWER:
        assert set(found) == {"bfloat16"}
    if name in WIDE:
        assert set(found) == {"float32"}


@pytest.mark.parametrize("name", LOWER)
def test_float16_too(name: str) -> None:
    with flame.autocast("cpu", dtype=flame.float16):
        found = _dtypes(LOWER[name](Maker(flame, ("float32",)), OURS))
    assert found == on_cuda(LOWER[name], ("float32",), torch.float16) == ["float16"]


@pytest.mark.parametrize("name", ALL)
def test_values_are_those_of_torch(name: str) -> None:
    """Where both round to bfloat16, up to its precision."""
    call = ALL[name]
    with flame.autocast("cpu", dtype=flame.bfloat16):
        ours = call(Maker(flame, ("float32",)), OURS)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = call(Maker(torch, ("float32",)), THEIRS)
    pairs = zip(
        ours if isinstance(ours, tuple) else (ours,),
        theirs if isinstance(theirs, tuple) else (theirs,), strict=True,
    )  # fmt: skip
    tolerance = 3e-2 if name in LOWER or name in LOWER_ON_CPU else 1e-5
    for a, b in pairs:
        want = b.float().numpy()
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(
            a.float().numpy(), want, rtol=tolerance, atol=tolerance * scale, err_msg=name
        )


def test_class_losses_are_in_float32() -> None:
    target, theirs = flame.tensor([0, 2, 1]), torch.tensor([0, 2, 1])
    for name in ("cross_entropy", "nll_loss", "multi_margin_loss"):
        scores = Maker(flame, ("bfloat16",))(3, 4)
        with flame.autocast("cpu"):
            loss = getattr(F, name)(scores, target)
        assert loss.dtype is flame.float32
        want = getattr(TF, name)(Maker(torch, ("bfloat16",))(3, 4).float(), theirs)
        np.testing.assert_allclose(loss.numpy(), want.numpy(), rtol=1e-5)
