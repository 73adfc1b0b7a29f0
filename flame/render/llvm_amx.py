"""LLVM IR of a function that multiplies packed panels of bfloat16 parts by the matrix unit (AMX).

A product of numbers that are sums of parts is the sum of the products of parts; those of small
parts are left out. Accumulation is in float32. See Henry, Tang, Heinecke 2019, "Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations". Tiles 0 to 3 hold a
32 x 32 block of sums, 4 and 5 the rows of A, 6 and 7 the columns of B. The unit is configured at
the beginning and released at the end, so that no state is left for others to save.
"""

from __future__ import annotations

from typing import Final

from flame.kernel.program import SPLIT_PARTS

# (part of A, part of B), in an order in which neighbours share one of them
ORDER: Final = {
    6: ((1, 1), (0, 1), (0, 2), (0, 0), (1, 0), (2, 0)),
    3: ((0, 1), (0, 0), (1, 0)),
    1: ((0, 0),),
}
TILE: Final = 1024  # bytes
BLOCK: Final = 4096  # bytes of the sums


def split_product_function(products: int) -> tuple[str, str]:
    """(name, text) of void (a, b, c, far, steps, add, open, close); see `SplitProduct`.

    ``far``: from row to row of c.
    """
    name = f"@split_product_{products}"
    parts = SPLIT_PARTS[products]
    text = f"""
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
@configuration_{products} = internal constant {_configuration()}, align 64
define internal void {name}(ptr %a, ptr %b, ptr %c, i64 %far, i64 %steps,
  i1 %add, i1 %open, i1 %close) noinline {{ entry:
  %staged = alloca [{BLOCK} x i8], align 64
  br i1 %open, label %configure, label %ready
configure:
  call void @llvm.x86.ldtilecfg(ptr @configuration_{products})
  br label %ready
ready:
  %any = icmp sgt i64 %steps, 0
  br i1 %any, label %start, label %end
start:
  {_lines([f"call void @llvm.x86.tilezero(i8 {n})" for n in range(4)])}
  br label %step
step:
  %s = phi i64 [ 0, %start ], [ %s.next, %step ]
  %offset = mul i64 %s, {2 * parts * TILE}
  %a.now = getelementptr i8, ptr %a, i64 %offset
  %b.now = getelementptr i8, ptr %b, i64 %offset
  {_lines(_products(products))}
  %s.next = add nsw i64 %s, 1
  %s.more = icmp slt i64 %s.next, %steps
  br i1 %s.more, label %step, label %last
last:
  br i1 %add, label %stage, label %put
put:
  %pitch = mul i64 %far, 4
  {_lines(_each_sum("c", "%pitch"))}
  br label %end
stage:
  {_lines(_each_sum("staged", "128"))}
  br label %sums
sums:
  %n = phi i64 [ 0, %stage ], [ %n.next, %sums ]
  %new.index = mul i64 %n, 32
  %new.at = getelementptr float, ptr %staged, i64 %new.index
  %old.index = mul i64 %n, %far
  %old.at = getelementptr float, ptr %c, i64 %old.index
  %new = load <32 x float>, ptr %new.at, align 64
  %old = load <32 x float>, ptr %old.at, align 4
  %both = fadd <32 x float> %new, %old
  store <32 x float> %both, ptr %old.at, align 4
  %n.next = add nsw i64 %n, 1
  %n.more = icmp slt i64 %n.next, 32
  br i1 %n.more, label %sums, label %end
end:
  br i1 %close, label %release, label %done
release:
  call void @llvm.x86.tilerelease()
  br label %done
done:
  ret void
}}
"""
    return name, text


def _lines(lines: list[str]) -> str:
    return "\n  ".join(lines)


def _configuration() -> str:
    """Eight tiles of 16 rows of 64 bytes: palette 1; bytes from 16, rows from 48."""
    numbers = [0] * 64
    numbers[0] = 1
    for tile in range(8):
        numbers[16 + 2 * tile] = 64
        numbers[48 + tile] = 16
    return f"[64 x i8] [{', '.join(f'i8 {n}' for n in numbers)}]"


def _each_sum(target: str, pitch: str) -> list[str]:
    """Store the four tiles of sums as one block, ``pitch`` bytes from row to row."""
    lines = [f"%{target}.half = mul i64 {pitch}, 16"]
    for tile in range(4):
        row, address = f"%{target}.row.{tile}", f"%{target}.{tile}"
        offset = f"%{target}.half" if tile // 2 else "0"
        lines += [
            f"{row} = getelementptr i8, ptr %{target}, i64 {offset}",
            f"{address} = getelementptr i8, ptr {row}, i64 {tile % 2 * 64}",
            f"call void @llvm.x86.tilestored64(i8 {tile}, ptr {address}, i64 {pitch})",
        ]
    return lines


def _products(products: int) -> list[str]:
    """One step of the depth. A tile is loaded as soon as what was in it has been multiplied."""
    lines: list[str] = []
    parts = SPLIT_PARTS[products]

    def load(matrix: str, t: int, part: int) -> None:
        tile, address = (4 if matrix == "a" else 6) + t, f"%{matrix}.{len(lines)}"
        offset = (t * parts + part) * TILE
        lines.append(f"{address} = getelementptr i8, ptr %{matrix}.now, i64 {offset}")
        lines.append(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr {address}, i64 64)")

    order = ORDER[products]
    for matrix, part in zip("ab", order[0], strict=True):
        load(matrix, 0, part)
        load(matrix, 1, part)
    for here, following in zip(order, (*order[1:], order[-1]), strict=True):
        # tiles of the factor that changes next are done with one after the other
        by_rows = here[0] != following[0]
        for first, second in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = (first, second) if by_rows else (second, first)
            tile = f"i8 {2 * row + column}, i8 {4 + row}, i8 {6 + column}"
            lines.append(f"call void @llvm.x86.tdpbf16ps({tile})")
            if second and by_rows:
                load("a", first, following[0])
            elif second and here[1] != following[1]:
                load("b", first, following[1])
    return lines
