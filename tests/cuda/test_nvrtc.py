"""The texts compiled by NVRTC to machine code of two generations of GPUs; no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.compiler.gpu.steps import KernelSpec
from flame.render.cuda import render

from .dry import kernels_of
from .foreach_cases import OPTIMIZERS, clipped, made, trained
from .host_compiler import DEFINE
from .instruction_cases import kernels_of_many
from .op_cases import launches_on_gpu, ops_with_kernels

nvrtc: Any = pytest.importorskip(
    "cuda.bindings.nvrtc", reason="NVRTC is not installed: pip install flame[cuda13]"
)
nvidia: Any = pytest.importorskip("nvidia", reason="the CUDA headers are not installed")

ARCHITECTURES = ("sm_80", "sm_90a")
ALLOWED = ("-diag-suppress=177",)  # a template's variable that this variant does not use
SHARES = 8  # so that workers share the ops


@cache
def headers() -> Path:
    """The folder of cuda_fp16.h."""
    for root in nvidia.__path__:
        for found in Path(root).glob("*/include/cuda_fp16.h"):
            return found.parent
    pytest.skip("the CUDA headers are not installed: pip install nvidia-cuda-runtime")


def machine_code(texts: Sequence[str], architecture: str) -> bytes:
    """All texts as one cubin, each in a namespace of its own. Fails with NVRTC's words."""
    parts = ["#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"]
    for number, text in enumerate(texts):
        body = re.sub(r"^\s*#\s*include\s*<.*$", "", text, flags=re.MULTILINE)
        body = re.sub(r'\bextern\s+"C"', "", body)  # names may come again in another namespace
        parts.append(f"namespace text_{number} {{\n{body}\n}}\n")
        parts += [f"#undef {name}\n" for name in dict.fromkeys(DEFINE.findall(text))]
    source = "".join(parts).encode()
    status, program = nvrtc.nvrtcCreateProgram(source, b"texts.cu", 0, [], [])
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device",
               "--Ofast-compile=max", f"-I{headers()}", *ALLOWED]  # fmt: skip
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size)  # never b" " * size, which for one byte is the b" " of all the process
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()[:4000]
    assert b"warning" not in log, log.decode()[:4000]
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_text_of_the_ops_compiles(architecture: str, share: int) -> None:
    specs: dict[str, KernelSpec] = {}
    for op in ops_with_kernels()[share::SHARES]:
        specs |= {spec.text: spec for spec in launches_on_gpu(op)}
    cubin = machine_code(list(specs), architecture)
    assert cubin.startswith(b"\x7fELF")
    assert all(spec.symbol.encode() in cubin for spec in specs.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_of_calls_compile(architecture: str) -> None:
    dtypes = (flame.float32, flame.bfloat16)
    works = [lambda m=m: trained(m, made(dtypes=dtypes), 1) for m in OPTIMIZERS.values()]
    many = [lambda: trained(OPTIMIZERS["AdamW"], made([(2,)] * 500), 1), lambda: clipped(2.0)]
    requests = kernels_of([*works, *many])
    texts = {text: symbol for text, symbol, _ in requests if "struct Items" in text}
    assert len(texts) > len(OPTIMIZERS)
    assert any("inp0[408]" in text for text in texts)  # as large as arguments may be
    cubin = machine_code(list(texts), architecture)
    assert all(symbol.encode() in cubin for symbol in texts.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instruction_compiles(architecture: str) -> None:
    texts = [render(bound).text for bound in kernels_of_many()]
    assert machine_code(texts, architecture).startswith(b"\x7fELF")
