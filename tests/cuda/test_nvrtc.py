"""The texts compiled by NVRTC for two generations of GPUs; no GPU is needed.

All of them become machine code of the newer one. For the older one it is that of the texts with
instructions of a generation's own alone; all others are plain C++, whose front end says whether the
generation has what they use: what it lets pass differs from the newer one's in its machine code.
"""

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
from tests.gpu.planted_faults import FAULTS

from .dry import kernels_of
from .foreach_cases import OPTIMIZERS, clipped, made, trained
from .host_compiler import DEFINE
from .instruction_cases import kernels_of_many
from .op_cases import launches_on_gpu, ops_with_kernels

nvrtc: Any = pytest.importorskip(
    "cuda.bindings.nvrtc", reason="NVRTC is not installed: pip install flame[cuda13]"
)
nvidia: Any = pytest.importorskip("nvidia", reason="the CUDA headers are not installed")

OLDER, NEWER = "sm_80", "sm_90a"
ALLOWED = ("-diag-suppress=177",)  # a template's variable that this variant does not use
SHARES = 8  # so that workers share the ops


@cache
def headers() -> Path:
    """The folder of cuda_fp16.h."""
    for root in nvidia.__path__:
        for found in Path(root).glob("*/include/cuda_fp16.h"):
            return found.parent
    pytest.skip("the CUDA headers are not installed: pip install nvidia-cuda-runtime")


def depends_on_the_generation(text: str) -> bool:
    return bool(re.search(r"\basm\b|__CUDA_ARCH__", text))


def compiled(texts: Sequence[str], architecture: str) -> bytes:
    """All texts as one cubin, or as PTX for an architecture "compute_*", each text in a namespace
    of its own. Fails with NVRTC's words."""
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
    kind = "PTX" if architecture.startswith("compute_") else "CUBIN"
    _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
    made = bytes(size)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, made)
    nvrtc.nvrtcDestroyProgram(program)
    assert made.startswith(b"\x7fELF") or kind == "PTX"
    return made


@pytest.mark.usefixtures("emulated_cuda")
@pytest.mark.parametrize("share", range(SHARES))
def test_every_text_of_the_ops_compiles(share: int) -> None:
    specs: dict[str, KernelSpec] = {}
    for op in ops_with_kernels()[share::SHARES]:
        specs |= {spec.text: spec for spec in launches_on_gpu(op)}
    own = [text for text in specs if depends_on_the_generation(text)]
    plain = [text for text in specs if not depends_on_the_generation(text)]
    for texts, architecture in (
        ([*own, *plain], NEWER), (own, OLDER), (plain, OLDER.replace("sm", "compute"))
    ):  # fmt: skip
        code = compiled(texts, architecture)
        assert all(specs[text].symbol.encode() in code for text in texts)


@pytest.mark.parametrize("architecture", [OLDER, NEWER])
def test_tables_of_calls_compile(architecture: str) -> None:
    dtypes = (flame.float32, flame.bfloat16)
    works = [lambda m=m: trained(m, made(dtypes=dtypes), 1) for m in OPTIMIZERS.values()]
    many = [lambda: trained(OPTIMIZERS["AdamW"], made([(2,)] * 500), 1), lambda: clipped(2.0)]
    requests = kernels_of([*works, *many])
    texts = {text: symbol for text, symbol, _ in requests if "struct Items" in text}
    assert len(texts) > len(OPTIMIZERS)
    assert any("inp0[408]" in text for text in texts)  # as large as arguments may be
    code = compiled(list(texts), architecture)
    assert all(symbol.encode() in code for symbol in texts.values())


@pytest.mark.parametrize("architecture", [OLDER, NEWER])
def test_every_instruction_compiles(architecture: str) -> None:
    compiled([render(bound).text for bound in kernels_of_many()], architecture)


@pytest.mark.parametrize("architecture", [OLDER, NEWER])
def test_planted_faults_compile(architecture: str) -> None:
    code = compiled([text for text, _ in FAULTS.values()], architecture)
    assert all(f"planted_{tool}".encode() in code for tool in FAULTS)
