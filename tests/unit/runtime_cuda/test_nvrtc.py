"""Real compilation, which needs no GPU."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from flame.core.errors import CompileError
from flame.runtime.cpu.cache import DiskCache
from flame.runtime.cuda import nvrtc
from flame.runtime.cuda.modules import Modules
from flame.runtime.cuda.nvrtc import compile_text, with_options

from .fake import MAGIC, FakeDriver

KERNEL = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
namespace { __device__ float half_of(float x) { return x * 0.5f; } }
extern "C" __global__ void NAME(const __nv_bfloat16* x, __half* y, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = __float2half(half_of(__bfloat162float(x[i])));
}
"""


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_machine_code_for_each_architecture(capability: tuple[int, int]) -> None:
    image = compile_text(KERNEL.replace("NAME", "convert"), "convert", capability)
    assert image[:4] == b"\x7fELF"
    assert b"convert" in image


def test_architectures() -> None:
    assert nvrtc.architecture((9, 0)) == "sm_90a"
    assert nvrtc.architecture((8, 6)) == "sm_86"
    assert nvrtc.architecture((12, 0)) == "sm_120"


def test_a_fault_is_shown_in_its_lines() -> None:
    text = 'extern "C" __global__ void k(float* x) {\n    int a = 1;\n    y[0] = a;\n}\n'
    with pytest.raises(CompileError) as caught:
        compile_text(text, "k", (9, 0))
    words = str(caught.value)
    assert "NVRTC refused kernel k for sm_90a" in words
    assert 'identifier "y" is undefined' in words
    assert "the source around line 3:" in words
    assert ">    3 |     y[0] = a;" in words
    assert "     2 |     int a = 1;" in words


def test_the_line_with_options_is_not_counted() -> None:
    text = with_options("__device__ int a;\n__device__ int b = c;\n", ["-DN=4"])
    with pytest.raises(CompileError, match=r">    2 \| __device__ int b = c;"):
        compile_text(text, "k", (9, 0))


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    with pytest.raises(CompileError, match=r"sm_750.*arch"):
        compile_text(KERNEL.replace("NAME", "k"), "k", (75, 0))


def test_products_and_sums_are_contracted_on_request_only() -> None:
    text = 'extern "C" __global__ void k(float* x) { x[0] = x[1] * x[2] + x[3]; }\n'
    contracted = with_options(text, ["--fmad=true"])
    assert nvrtc.text_options(contracted) == ("--fmad=true",)
    assert nvrtc.text_options(text) == ()
    assert compile_text(text, "k", (9, 0)) != compile_text(contracted, "k", (9, 0))
    both = with_options(contracted, ["-DN=4"])
    assert nvrtc.text_options(both) == ("--fmad=true", "-DN=4")
    compile_text(both.replace("x[0]", "x[N]"), "k", (9, 0))


def test_the_identity_names_versions_and_options() -> None:
    assert nvrtc.identity().startswith("NVRTC ")
    assert "--fmad=false" in nvrtc.identity()


def test_joined_texts_stand_in_namespaces_behind_all_includes() -> None:
    joined = nvrtc.join(
        [KERNEL.replace("NAME", "a"), "#include <cuda_bf16.h>\n" + KERNEL.replace("NAME", "b")]
    )
    assert joined.splitlines()[:2] == ["#include <cuda_fp16.h>", "#include <cuda_bf16.h>"]
    assert joined.count("#include") == 2
    assert joined.index("namespace flame_text_0 {") < joined.index("void a(")
    assert joined.index("namespace flame_text_1 {") < joined.index("void b(")


class _Compiling(FakeDriver):
    """Compiles in earnest, and loads what is no text."""

    def compile(self, text: str, name: str, capability: tuple[int, int]) -> bytes:
        self.programs.append(text)
        return MAGIC + compile_text(text, name, capability)

    def compile_together(
        self, texts: Sequence[str], name: str, capability: tuple[int, int]
    ) -> bytes:
        return self.compile(nvrtc.join(texts), name, capability)

    def load_module(self, device: int, image: bytes) -> int:
        module = next(self.numbers)
        self.modules[module] = image.decode("latin1")
        return module


def test_texts_with_equal_helpers_compile_as_one_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_NUM_THREADS", "1")
    made = Modules(_Compiling(), DiskCache(tmp_path))
    requests = [(KERNEL.replace("NAME", f"k{i}"), f"k{i}", 0) for i in range(4)]
    handles = made.load_many(0, requests)
    assert made.statistics.programs == 1
    assert len(set(handles)) == 4
