"""Mixed precision on a GPU: types of the table, training in float16 with a scaler, no waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flame
import flame.nn.functional as F
from flame import nn, optim
from flame.core.errors import DeviceError, UnsupportedError

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _a_gpu() -> None:
    try:
        flame.zeros((1,), device="cuda")
    except DeviceError as error:
        pytest.skip(str(error))


def array(*shape: int, seed: int = 0) -> flame.Tensor:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return flame.from_numpy(values).to("cuda")


@pytest.mark.parametrize("dtype", [flame.float16, flame.bfloat16])
def test_types_and_values(dtype: Any) -> None:
    x, w = array(64, 64), array(64, 64, seed=1)
    with flame.autocast("cuda", dtype=dtype):
        product, probabilities = x @ w, (x @ w).softmax(-1)
        image = F.conv2d(array(2, 8, 16, 16), array(8, 8, 3, 3, seed=2))
    assert product.dtype is image.dtype is dtype
    assert probabilities.dtype is flame.float32
    wanted = x.cpu().numpy() @ w.cpu().numpy()
    np.testing.assert_allclose(product.float().cpu().numpy(), wanted, rtol=2e-2, atol=0.3)


def test_a_region_for_the_cpu_leaves_a_gpu_alone() -> None:
    x = array(8, 8)
    with flame.autocast("cpu"):
        assert (x @ x).dtype is flame.float32
    with flame.autocast("cuda"):
        assert (x.cpu() @ x.cpu()).dtype is flame.float32
        assert flame.get_autocast_dtype("cuda") is flame.float16


def test_binary_cross_entropy_is_refused() -> None:
    p = array(4).sigmoid()
    with flame.autocast("cuda"), pytest.raises(UnsupportedError, match="with_logits"):
        F.binary_cross_entropy(p, p)


class Run:
    def __init__(self, device: str) -> None:
        flame.manual_seed(0)
        self.device = device
        self.model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).to(device)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scaler = flame.amp.GradScaler(device, growth_interval=5)
        draw = np.random.default_rng(1)
        self.x = flame.from_numpy(draw.standard_normal((64, 16), dtype=np.float32)).to(device)
        self.y = flame.from_numpy(draw.integers(0, 4, 64)).to(device)

    def step(self, x: Any, y: Any) -> Any:
        self.optimizer.zero_grad()
        with flame.autocast(self.device, dtype=flame.float16):
            loss = F.cross_entropy(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def train(self, step: Any) -> tuple[list[float], list[float]]:
        losses, scales = [], []
        for i in range(20):
            x = self.x * float("inf") if i in (3, 11) else self.x
            losses.append(float(step(x, self.y).item()))
            scales.append(self.scaler.get_scale())
        return losses, scales


@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_a_scaler_is_that_on_the_cpu(compiled: bool) -> None:
    there, here = Run("cuda"), Run("cpu")
    losses, scales = there.train(flame.compile(there.step) if compiled else there.step)
    wanted, wanted_scales = here.train(here.step)
    assert scales == wanted_scales
    np.testing.assert_allclose(losses, wanted, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_skipped_step_changes_no_bit(compiled: bool) -> None:
    run = Run("cuda")
    step = flame.compile(run.step) if compiled else run.step
    step(run.x, run.y)

    def state() -> list[Any]:
        saved = run.optimizer.state_dict()["state"].values()
        tensors = [*run.model.parameters(), *[t for s in saved for _, t in sorted(s.items())]]
        return [t.detach().cpu().numpy().copy() for t in tensors]

    before = state()
    step(run.x * float("inf"), run.y)
    for a, b in zip(before, state(), strict=True):
        np.testing.assert_array_equal(a, b)
