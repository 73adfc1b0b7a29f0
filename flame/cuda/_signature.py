"""The parameters of a kernel, as far as they can be read from its text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flame.core import dtypes
from flame.core.dtypes import DType

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_QUALIFIER = re.compile(r"\b(?:const|volatile|__restrict__|__restrict|struct)\b|__grid_constant__")

# Spelling in C++ -> (dtype of a tensor behind a pointer, NumPy's name of a number).
_TYPES: dict[str, tuple[DType | None, str]] = {
    "bool": (dtypes.bool_, "bool"),
    "char": (dtypes.int8, "int8"),
    "signed char": (dtypes.int8, "int8"),
    "int8_t": (dtypes.int8, "int8"),
    "unsigned char": (dtypes.uint8, "uint8"),
    "uint8_t": (dtypes.uint8, "uint8"),
    "short": (dtypes.int16, "int16"),
    "int16_t": (dtypes.int16, "int16"),
    "int": (dtypes.int32, "int32"),
    "int32_t": (dtypes.int32, "int32"),
    "unsigned": (None, "uint32"),
    "unsigned int": (None, "uint32"),
    "uint32_t": (None, "uint32"),
    "long": (dtypes.int64, "int64"),
    "long int": (dtypes.int64, "int64"),
    "long long": (dtypes.int64, "int64"),
    "long long int": (dtypes.int64, "int64"),
    "int64_t": (dtypes.int64, "int64"),
    "unsigned long": (None, "uint64"),
    "unsigned long long": (None, "uint64"),
    "uint64_t": (None, "uint64"),
    "size_t": (None, "uint64"),
    "float": (dtypes.float32, "float32"),
    "double": (dtypes.float64, "float64"),
    "half": (dtypes.float16, "float16"),
    "__half": (dtypes.float16, "float16"),
    "nv_bfloat16": (dtypes.bfloat16, "bfloat16"),
    "__nv_bfloat16": (dtypes.bfloat16, "bfloat16"),
}


@dataclass(frozen=True)
class Parameter:
    """text: as written, type: without the name. dtype: of tensors, where the type is a pointer and
    known. number: NumPy's name, where it is a number and known. written: whether the kernel may
    write through it."""

    text: str
    type: str
    pointer: bool
    written: bool
    dtype: DType | None = None
    number: str | None = None


def parameters(source: str, name: str) -> tuple[Parameter, ...] | None:
    """The parameters of the kernel ``name``; None where the text does not show them (a macro)."""
    text = _COMMENT.sub(" ", source)
    found = re.search(rf"__global__\b[^;{{}}]*?\b{re.escape(name)}\s*\(", text)
    if found is None:
        return None
    depth, start, parts = 0, found.end(), []
    for position in range(start, len(text)):
        sign = text[position]
        if sign == ")" and depth == 0:
            parts.append(text[start:position])
            break
        if sign == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        elif sign in "(<[":
            depth += 1
        elif sign in ")>]":
            depth -= 1
    else:
        return None
    written = [" ".join(part.split()) for part in parts]
    return () if written == [""] or written == ["void"] else tuple(map(_parameter, written))


def _parameter(text: str) -> Parameter:
    plain = " ".join(_QUALIFIER.sub(" ", text).split())
    if "*" in plain or "[" in plain:
        kind = re.split(r"[*\[]", plain, maxsplit=1)[0].strip()
        if "*" not in plain:  # float x[]: the name stands before the bracket
            kind = kind.rpartition(" ")[0]
        constant = re.search(r"\bconst\b[^*]*\*", text) is not None or (
            "*" not in plain and "const" in text
        )
        depth = plain.count("*") + plain.count("[")
        dtype = _TYPES.get(kind, (None, ""))[0] if depth == 1 else None
        type_ = f"{'const ' if constant else ''}{kind}{'*' * depth}"
        return Parameter(text, type_, pointer=True, written=not constant, dtype=dtype)
    kind = plain if plain in _TYPES else plain.rpartition(" ")[0]
    number = _TYPES[kind][1] if kind in _TYPES else None
    return Parameter(text, kind, pointer=False, written=False, number=number)


def as_device_function(source: str, name: str) -> tuple[str, str]:
    """The text with the kernel ``name`` as a function for other kernels, and its launch bounds."""
    found = re.search(rf"__global__\b([^;{{}}]*?)\b{re.escape(name)}\s*\(", source)
    if found is None:
        return source, ""
    bounds = re.search(r"__launch_bounds__\s*\([^()]*\)", found.group(1))
    between = found.group(1) if bounds is None else found.group(1).replace(bounds.group(), "")
    head = f"__device__ __forceinline__{between}{name}("
    made = source[: found.start()] + head + source[found.end() :]
    return made, "" if bounds is None else bounds.group()
