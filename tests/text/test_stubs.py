"""The stub that tells type checkers and editors which methods a Tensor has, generated from the ops.

``pytest tests/text --update`` rewrites it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flame
from flame import api

STUB = Path(flame.__file__).parent / "methods.pyi"

HEAD = '''"""Methods that `flame.api` attaches to Tensor; made by pytest tests/text --update."""

import builtins
from collections.abc import Callable, Sequence
from typing import Any

from flame.core.dtypes import DType
from flame.ops.generator import Generator
from flame.core.types import Shape
from flame.tensor import Tensor

class Methods:
'''
KNOWN = {"Any", "Callable", "Sequence", "DType", "Generator", "Shape", "Tensor", "None", "int",
         "float", "bool", "str", "tuple", "list", "dict", "type", "object"}  # fmt: skip


def annotation_of(text: Any, default: str) -> str:
    """An annotation by its text, or Any where it names something that the stub does not import."""
    if not isinstance(text, str):
        return default
    if not set(re.findall(r"[A-Za-z_]\w*", text)) <= KNOWN:
        return default
    # inside the class, these names are methods
    return re.sub(r"\b(int|float|bool)\b", r"builtins.\1", text)


def signature_of(name: str, function: Callable[..., Any]) -> str:
    """``def name(self, ...) -> ...: ...``"""
    parameters = list(inspect.signature(function).parameters.values())
    parts = ["self"]
    for p in parameters[1:]:
        if p.kind is p.KEYWORD_ONLY and not any(x.startswith("*") for x in parts):
            parts.append("*")
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else " = ..."
        parts.append(f"{star}{p.name}: {annotation_of(p.annotation, 'Any')}{default}")
    returned = annotation_of(inspect.signature(function).return_annotation, "Any")
    if name.startswith("__") and name not in ("__setitem__", "__contains__"):
        returned = "Tensor"
    ignore = "  # type: ignore[override]" if name in ("__eq__", "__ne__") else ""
    return f"    def {name}({', '.join(parts)}) -> {returned}: ...{ignore}"


def stub_text() -> str:
    """The whole stub, methods in order of name."""
    methods: dict[str, str] = {}
    for module in api.MODULES:
        for name in getattr(module, "METHODS", ()):
            member = getattr(module, name)
            if isinstance(member, property):
                methods[name] = f"    @property\n    def {name}(self) -> Tensor: ..."
            else:
                methods[name] = signature_of(name, member)
        for name in getattr(module, "IN_PLACE", ()):
            methods[f"{name}_"] = signature_of(f"{name}_", getattr(module, name))
        for name, member in getattr(module, "OPERATORS", {}).items():
            if isinstance(member, property):
                methods[name] = f"    @property\n    def {name}(self) -> Tensor: ..."
            else:
                methods[name] = signature_of(name, member)
    return HEAD + "\n".join(methods[name] for name in sorted(methods)) + "\n"


def test_stub_is_current(request: pytest.FixtureRequest) -> None:
    made = stub_text()
    if request.config.getoption("--update"):
        STUB.write_text(made)
    assert made == STUB.read_text(), "run pytest tests/text --update and review flame/methods.pyi"
