"""Schedules that a GPU has to itself: cut reductions, rows in registers, packs of columns, tiles.

Results are those of the CPU's schedules. Shapes are the smallest ones that a schedule is chosen
for; what is chosen is read off the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import flame
from flame.compiler.pipeline import lower, results
from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import tensor_type
from flame.graph import one_op
from flame.kernel.builder import BoundSource
from flame.kernel.geometry import Geometry, KernelLaunch
from flame.nn import functional as F
from flame.ops.op import OPS
from flame.render.cuda import render
from flame.render.cuda_geometry import geometry_of
from flame.testing import gradcheck  # noqa: F401 - the package declares every op

from .test_scans import close

TOLERANCE = {dtypes.float32: 3e-5, dtypes.bfloat16: 3e-2}


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def both(
    function: Callable[..., Any], arrays: Sequence[Any], dtype: DType = dtypes.float32
) -> None:
    """Results and gradients on the device are those on the CPU."""
    found = []
    for device in ("cpu", "cuda"):
        given = [flame.from_numpy(a).to(dtype).to(device).requires_grad_() for a in arrays]
        made = function(*given)
        scale = flame.from_numpy(draw(*made.shape, seed=9)).to(device)
        (made.float() * scale).sum().backward()
        found.append([made, *(x.grad for x in given)])
    for here, there in zip(*found, strict=True):
        close(there, here, TOLERANCE[dtype])


def launches(name: str, *shapes: Any, dtype: DType = dtypes.bfloat16, **attributes: Any) -> Any:
    """The launches of an op on operands of these shapes, numbers as they are."""
    types = tuple(
        tensor_type(dtype, x, None, "cuda:0") if isinstance(x, tuple) else x for x in shapes
    )
    graph = one_op(OPS[name], types, attributes)
    steps = lower(graph, results(graph, None)).steps
    return [s if isinstance(s, BoundSource) else render(s) for s in steps]


# --- what is chosen -------------------------------------------------------------------------------


def threads(launch: KernelLaunch) -> int:
    return launch.grid[0] * launch.block[0]


@pytest.mark.parametrize("columns", [64, 768, 3072, 16384])
def test_sums_over_rows_fill_the_device(columns: int) -> None:
    parts, total = launches("sum", (32768, columns), dims=(0,), keepdim=False)
    assert threads(parts) >= min(132 * 256, 32768 // 16 * columns // 8)
    assert "Pack<__nv_bfloat16, 8> inp0_pack" in parts.text
    assert threads(total) >= columns


def test_small_tensors_are_shared_out() -> None:
    (launch,) = launches("exp", (6272,))
    assert threads(launch) >= 6272 // 16
    (launch,) = launches("exp", (1 << 24,))
    assert "8192" in launch.text


@pytest.mark.parametrize("length", [64, 768, 1152, 4096, 16384])
def test_rows_are_read_once(length: int) -> None:
    (launch,) = launches("softmax", (4096, length), dim=1)
    loads = [line for line in launch.text.splitlines() if "*(const Pack" in line]
    assert len(loads) == 1
    assert "inp0_held" in loads[0]


def test_rows_that_registers_cannot_hold_are_read_again() -> None:
    (launch,) = launches("softmax", (64, 50304), dim=1)
    assert "_held" not in launch.text
    assert launch.block[0] == 1024


def test_held_sums_need_no_scratch() -> None:
    shapes = ((4096, 768), (4096, 768), (768,), float)
    first, runs, total = launches("layer_norm_backward", *shapes, rows=1)
    assert "float local0[" in first.text
    assert first.scratch == 0
    assert "scratch" not in first.text
    assert all("Pack<float, 4>" in launch.text for launch in (runs, total))


def test_held_rows_are_kept_out_of_other_geometries() -> None:
    types = (tensor_type(dtypes.float32, (64, 768), None, "cuda:0"),)
    graph = one_op(OPS["softmax"], types, {"dim": 1})
    (bound,) = lower(graph, results(graph, None)).kernels
    assert geometry_of(bound).held > 0
    assert "_held" not in render(bound, Geometry(32, 64)).text


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager_cuda")
class TestEager:
    @pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(9, 768), (37, 70), (5, 2056)])
    def test_layer_norm(self, shape: tuple[int, int], dtype: DType) -> None:
        width = shape[1]
        arrays = [draw(*shape), draw(width, seed=1), draw(width, seed=2)]
        both(lambda x, w, b: F.layer_norm(x, (width,), w, b), arrays, dtype)

    def test_layer_norm_without_weights(self) -> None:
        both(lambda x: F.layer_norm(x, (72,)), [draw(130, 72)])

    @pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.bfloat16], ids=str)
    @pytest.mark.parametrize("dim", [0, 1])
    def test_softmax(self, dim: int, dtype: DType) -> None:
        both(lambda x: x.softmax(dim), [draw(70, 264)], dtype)
        both(lambda x: x.log_softmax(dim), [draw(33, 67)], dtype)

    def test_nan_passes_through_a_row(self) -> None:
        x = draw(3, 300)
        x[1, 17] = np.nan
        got = flame.from_numpy(x).to("cuda").softmax(1).cpu().numpy()
        assert np.isnan(got[1]).all()
        assert not np.isnan(got[[0, 2]]).any()

    @pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (0, 1), (0, 1, 2)], ids=str)
    def test_cut_sums(self, dims: tuple[int, ...]) -> None:
        both(lambda x: x.sum(dims), [draw(3, 3000, 9)])

    @pytest.mark.parametrize("offset", [0, 3])
    def test_columns_that_are_not_aligned(self, offset: int) -> None:
        both(lambda x: x[:, offset:].sum(0), [draw(700, 75)], dtypes.bfloat16)

    def test_extremes_over_rows(self) -> None:
        x = draw(3000, 40)
        for name in ("amax", "amin"):
            got, want = (
                getattr(t, name)(0).cpu().numpy()
                for t in (flame.from_numpy(x).to("cuda"), flame.from_numpy(x))
            )
            np.testing.assert_array_equal(got, want)

    def test_dropout_draws_what_the_cpu_draws(self) -> None:
        x = draw(6272)
        for count in (6272, 1000, 63, 1):
            made = []
            for device in ("cpu", "cuda"):
                flame.manual_seed(3)
                given = flame.from_numpy(x[:count]).to(device)
                made.append(F.dropout(given, 0.3, training=True).cpu().numpy())
            np.testing.assert_array_equal(*made)

    @pytest.mark.parametrize(
        "dtype",
        [dtypes.float32, dtypes.bfloat16, dtypes.bool_],
        ids=str,
    )
    @pytest.mark.parametrize(
        ("shape", "order", "start"),
        [
            ((300, 200), (1, 0), 0),
            ((301, 203), (1, 0), 3),
            ((5, 130, 3, 3), (0, 2, 3, 1), 0),
            ((2, 9, 9, 130), (0, 3, 1, 2), 0),
            ((3, 3, 40, 70), (0, 2, 3, 1), 0),
            ((3, 40, 70, 3), (0, 3, 1, 2), 1),
            ((2, 70, 3, 90), (0, 3, 2, 1), 0),
        ],
    )
    def test_copies_that_turn(
        self, shape: tuple[int, ...], order: tuple[int, ...], start: int, dtype: DType
    ) -> None:
        x = np.random.default_rng(0).integers(-100, 100, shape).astype(np.float32)
        here = flame.from_numpy(x).to(dtype)
        there = here.to("cuda")
        got, want = (t[..., start:].permute(order).contiguous() for t in (there, here))
        close(got, want, 0.0)

    def test_copies_that_turn_and_convert(self) -> None:
        x = flame.from_numpy(draw(130, 80))
        kinds = (dtypes.float32, dtypes.bfloat16, dtypes.float16)
        for source in kinds:
            for target in kinds:
                here = x.to(source)
                got, want = (t.t().to(target).contiguous() for t in (here.to("cuda"), here))
                close(got, want, 0.0)

    def test_max_pool_of_channels_last_images(self) -> None:
        order = np.random.default_rng(0).permutation(2 * 20 * 9 * 11)
        x = (order.reshape(2, 9, 11, 20) / 64).astype(np.float32)
        for kernel, stride, padding in ((3, 2, 1), (2, 2, 0), (3, 1, 1)):
            both(
                lambda t, k=kernel, s=stride, p=padding: F.max_pool2d(
                    t.permute(0, 3, 1, 2), k, s, p
                ),
                [x],
            )


def turned_copy() -> BoundSource:
    types = (tensor_type(dtypes.bfloat16, (512, 512), (1, 512), "cuda:0"),)
    graph = one_op(OPS["copy"], types, {"contiguous": True})
    (step,) = lower(graph, results(graph, None)).steps
    assert isinstance(step, BoundSource)
    return step


def test_a_transpose_takes_square_tiles() -> None:
    step = turned_copy()
    assert "#define ROWS 64" in step.text
    assert step.grid == (64, 1, 1)


# --- fused groups ---------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    """A compiled step on the device gives the results and gradients of eager calls on the CPU."""

    def step(*given: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in given]
        made = function(*leaves)
        (made * made).sum().backward()
        return made.detach(), *(x.grad for x in leaves)

    want = step(*(flame.from_numpy(a) for a in arrays))
    program = flame.compile(step)
    got = program(*(flame.from_numpy(a).to("cuda") for a in arrays))
    for here, there in zip(want, got, strict=True):
        close(there, here, 1e-4)
    return program


@pytest.mark.usefixtures("emulated_cuda")
class TestFused:
    def test_gradients_of_biases_are_cut_into_parts(self) -> None:
        program = compiled(
            lambda x, b, w: F.gelu(x + b) * w, [draw(1500, 72), draw(72), draw(1500, 72)]
        )
        assert "_parts" in program.report() or "[0] [1]" in program.report()

    def test_sums_over_rows_beside_rows(self) -> None:
        def rms(x: Any, w: Any) -> Any:
            return x * flame.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w

        compiled(rms, [draw(150, 72), draw(72)])
        compiled(rms, [draw(4, 1100), draw(1100)])

    def test_tokens_of_samples(self) -> None:
        compiled(lambda x, b: (x * b).sum(1) * 2, [draw(5, 200, 64), draw(5, 1, 64)])

    def test_a_loss_over_patches(self) -> None:
        def loss(a: Any, b: Any) -> Any:
            patches = a.reshape(4, 5, 6, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
            return ((patches.reshape(4, 3, 10, 12) - b) ** 2).mean()

        compiled(loss, [draw(4, 30, 12), draw(4, 3, 10, 12)])

    def test_a_long_loss_over_patches(self) -> None:
        def loss(a: Any, b: Any) -> Any:
            patches = a.reshape(8, 20, 16, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
            return ((patches.reshape(8, 3, 40, 32) - b) ** 2).mean()

        compiled(loss, [draw(8, 320, 12), draw(8, 3, 40, 32)])
