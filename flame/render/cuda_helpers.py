"""Functions that come with a kernel's text, those alone that it calls."""

from __future__ import annotations

from typing import Final

_HEAD: Final = "__device__ __forceinline__"
_WORD: Final = {
    "double": "double", "float": "float", "long long": "long", "int": "int", "short": "short",
    "signed char": "char", "unsigned char": "byte", "unsigned": "unsigned",
    "unsigned long long": "unsigned_long",
}  # fmt: skip


class Helpers:
    """The functions of one text, in an order in which each follows those that it calls."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add(self, name: str, text: str) -> str:
        self.texts.setdefault(name, text)
        return name

    def extreme(self, op: str, type_: str) -> str:
        """The larger or smaller float; NaN if one is NaN."""
        name, function = f"{op}_{type_}", f"f{op}{'f' if type_ == 'float' else ''}"
        return self.add(name, (
            f"{_HEAD} {type_} {name}({type_} a, {type_} b) {{\n"
            f"{_one_instruction(op) if type_ == 'float' else ''}"
            f"  return a != a || b != b ? a + b : {function}(a, b);\n"
            "}"
        ))  # fmt: skip

    def truncation(self, type_: str, *, wide: bool) -> str:
        """A float as a whole number: rounded to zero, the nearest one out of range, 0 for NaN."""
        whole, word = ("long long", "long") if wide else ("int", "int")
        name = f"truncate_{type_}_to_{word}"
        bound = ("9223372036854775808.0" if wide else "2147483648.0") + "f" * (type_ == "float")
        top = "0x7fffffffffffffffLL" if wide else "0x7fffffff"
        return self.add(name, (
            f"{_HEAD} {whole} {name}({type_} x) {{\n"
            f"  if (x != x) return 0;\n"
            f"  if (x >= {bound}) return {top};\n"
            f"  return x < -{bound} ? -{top} - 1 : ({whole})x;\n"
            "}"
        ))  # fmt: skip

    def division(self, op: str, type_: str, *, signed: bool) -> str:
        """floordiv and mod as in Python; 0 for a divisor of 0."""
        name = f"{op}_{_WORD[type_]}"
        sign = "/" if op == "floordiv" else "%"
        if not signed:
            body = f"  return b == 0 ? 0 : ({type_})(a {sign} b);\n"
        else:  # the smallest number over -1 would overflow
            minus = f"({type_})(0ULL - (unsigned long long)a)" if op == "floordiv" else "0"
            change = f"({type_})(a / b - 1)" if op == "floordiv" else f"({type_})(a % b + b)"
            body = (
                "  if (b == 0) return 0;\n"
                f"  if (b == -1) return {minus};\n"
                f"  const bool between = a % b != 0 && (a % b < 0) != (b < 0);\n"
                f"  return between ? {change} : ({type_})(a {sign} b);\n"
            )
        return self.add(name, f"{_HEAD} {type_} {name}({type_} a, {type_} b) {{\n{body}}}")

    def power(self, type_: str, *, signed: bool) -> str:
        """Integer power, wrapping; a negative exponent gives 1 / a**-b rounded to zero."""
        name = f"power_{_WORD[type_]}"
        negative = (
            "  if (b < 0) return a == 1 ? 1 : a == -1 ? (b & 1 ? -1 : 1) : 0;\n" if signed else ""
        )
        return self.add(name, (
            f"{_HEAD} {type_} {name}({type_} a, {type_} b) {{\n"
            f"{negative}"
            "  unsigned long long made = 1, square = (unsigned long long)a;\n"
            "  for (unsigned long long rest = (unsigned long long)b; rest; rest >>= 1) {\n"
            "    if (rest & 1) made *= square;\n"
            "    square *= square;\n"
            "  }\n"
            f"  return ({type_})made;\n"
            "}"
        ))  # fmt: skip

    def product_half(self, *, high: bool) -> str:
        """The upper or the lower 32 bits of a product of 64. Where both are wanted, as in random
        bits, they are of one instruction: the compiler makes two of ``__umulhi`` and ``*``."""
        self.add("product", (
            f"{_HEAD} unsigned long long product(unsigned a, unsigned b) {{\n"
            "#ifdef __CUDA_ARCH__\n"
            "  unsigned long long made;\n"
            '  asm("mul.wide.u32 %0, %1, %2;" : "=l"(made) : "r"(a), "r"(b));\n'
            "  return made;\n"
            "#else\n"
            "  return (unsigned long long)a * b;\n"
            "#endif\n"
            "}"
        ))  # fmt: skip
        name, half = ("high_product", " >> 32") if high else ("low_product", "")
        return self.add(name, (
            f"{_HEAD} unsigned {name}(unsigned a, unsigned b) {{\n"
            f"  return (unsigned)(product(a, b){half});\n"
            "}"
        ))  # fmt: skip

    def pack(self) -> str:
        """Neighbours in memory that one access moves."""
        return self.add("Pack", (
            "template <typename T, int N>\n"
            "struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {\n"
            "  T item[N];\n"
            "};"
        ))  # fmt: skip

    def fold(self, combine: str, type_: str, step: str) -> str:
        """Lanes combined, by ``step`` of ``a`` and ``b``: all get the same total, always in the
        same order."""
        name = f"fold_{combine}_{_WORD.get(type_, type_)}"
        return self.add(name, (
            "template <int LANES>\n"
            f"{_HEAD} {type_} {name}({type_} a, unsigned mates) {{\n"
            "  #pragma unroll\n"
            "  for (int apart = LANES / 2; apart > 0; apart /= 2) {\n"
            f"    const {type_} b = __shfl_xor_sync(mates, a, apart);\n"
            f"    a = {step};\n"
            "  }\n"
            "  return a;\n"
            "}"
        ))  # fmt: skip


def _one_instruction(op: str) -> str:
    """An extreme of floats by the one instruction that passes NaN on."""
    return (
        "#if __CUDA_ARCH__ >= 800\n"
        "  float made;\n"
        f'  asm("{op}.NaN.f32 %0, %1, %2;" : "=f"(made) : "f"(a), "f"(b));\n'
        "  return made;\n"
        "#endif\n"
    )
