"""Copies on a GPU whose source and target are contiguous in different dimensions: turn.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flame.core import dtypes
from flame.core.dtypes import DType
from flame.core.types import TensorType
from flame.kernel.builder import Lowering, Ref
from flame.ops.cuda_lines import Lines, each, launch, number_defines
from flame.ops.loops import Nest

TILE: Final = 64  # rows and columns of a square tile
FEWEST: Final = 4096  # elements below which a plain copy is as good
FLOATS: Final = (dtypes.float32, dtypes.float16, dtypes.bfloat16)
_WORDS: Final = {1: "unsigned char", 2: "unsigned short", 4: "unsigned", 8: "unsigned long long"}


@dataclass(frozen=True)
class _Turn:
    """Matrices of (rows, columns): rows lie along the source, columns along the target."""

    rows: int
    columns: int
    x_step: int  # of the source, from column to column
    y_step: int  # of the target, from row to row

    @property
    def tile(self) -> tuple[int, int] | None:
        """Rows and columns of a tile; None where tiles gain nothing."""
        if self.rows >= TILE and self.columns >= TILE:
            return TILE, TILE
        if 1 < self.rows < TILE <= self.columns and self.x_step == self.rows:
            return self.rows, TILE * max(1, TILE // self.rows // 2)
        if 1 < self.columns < TILE <= self.rows and self.y_step == self.columns:
            return TILE * max(1, TILE // self.columns // 2), self.columns
        return None


def lower_turn(x: TensorType, out: TensorType, nest: Nest) -> Lowering | None:
    """A copy as launches of turn.cu; None where it turns nothing, or converts in another way."""
    plain = x.dtype is out.dtype
    if not (plain or (x.dtype in FLOATS and out.dtype in FLOATS)) or out.numel < FEWEST:
        return None
    last = len(nest.sizes) - 1
    source, target = nest.strides
    rows = next((d for d in range(last) if source[d] == 1), None)
    if rows is None or target[last] != 1 or source[last] in (0, 1):
        return None
    turn = _Turn(nest.sizes[rows], nest.sizes[last], source[last], target[rows])
    if turn.tile is None:
        return None
    height, width = turn.tile
    rest = [d for d in range(last) if d != rows]
    lines = Lines(
        tuple(nest.sizes[d] for d in rest),
        [tuple(steps[d] for d in rest) for steps in (source, target)],
    )
    tiles = each(turn.rows, height), each(turn.columns, width)
    call = launch(
        "turn", "turn",
        {
            **_types(x.dtype, out.dtype),
            "ROWS": height,
            "COLS": width,
            "SHORT_ROWS": int(turn.rows == height < TILE),
            "SHORT_COLS": int(turn.columns == width < TILE),
        },
        (Ref("input", 0), Ref("output", 0)),
        (turn.rows, turn.columns, turn.x_step, turn.y_step, *tiles),
        lines, blocks=lines.count * tiles[0] * tiles[1], threads=256,
    )  # fmt: skip
    return Lowering((), calls=(call,))


def _types(source: DType, target: DType) -> dict[str, object]:
    """What turn.cu has to know of the elements: words where nothing is converted."""
    if source is target:
        word = _WORDS[max(source.itemsize, 1)]
        return {"IN": word, "OUT": word, "MOVE(v)": "(v)", "USES_HALF": 0, "USES_BFLOAT16": 0}
    made = dict(number_defines(IN=source, OUT=target))
    wide = {
        dtypes.float32: "(v)",
        dtypes.float16: "__half2float(v)",
        dtypes.bfloat16: "__bfloat162float(v)",
    }
    narrow = {
        dtypes.float32: "{}",
        dtypes.float16: "__float2half_rn({})",
        dtypes.bfloat16: "__float2bfloat16_rn({})",
    }
    return {**made, "MOVE(v)": narrow[target].format(wide[source])}
