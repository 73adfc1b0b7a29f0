"""CUDA C++ text to machine code, by NVRTC. It needs no GPU and no driver.

Products and sums are not contracted (``--fmad=false``): a kernel then computes the same bits
whether it was fused or not, on a GPU or a CPU. A text that wants otherwise says so in its first
line, which may hold options: ``// nvrtc: --fmad=true --maxrregcount=64``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from flame.core.errors import CompileError
from flame.core.log import log
from flame.runtime.cuda.packages import (
    bindings,
    calling,
    include_directories,
    package_version,
)

_OPTIONS = ("--std=c++17", "--fmad=false")
_MARK = "// nvrtc:"
_SHOWN_LINES = 3  # before and after a fault
_INCLUDE = re.compile(r"^\s*#\s*include\b.*$", re.MULTILINE)


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name: 9.0 with the instructions that only this architecture has (wgmma, TMA)."""
    major, minor = capability
    return f"sm_{major}{minor}a" if capability == (9, 0) else f"sm_{major}{minor}"


def text_options(text: str) -> tuple[str, ...]:
    """The options that the first line of a text asks for."""
    first = text.split("\n", 1)[0]
    return tuple(first[len(_MARK) :].split()) if first.startswith(_MARK) else ()


def with_options(text: str, options: Sequence[str]) -> str:
    """The text that asks for these options (without spaces inside) as well."""
    if not options:
        return text
    return f"{_MARK} {' '.join((*text_options(text), *options))}\n{text}"


def compile_text(text: str, name: str, capability: tuple[int, int]) -> bytes:
    """The cubin of a text. ``name`` is for messages. Several threads may call it at once.

    Raises CompileError with NVRTC's words and the lines around the fault, DeviceError where NVRTC
    or CUDA's headers are missing.
    """
    nvrtc = bindings("nvrtc")
    arch = architecture(capability)
    options = [f"--gpu-architecture={arch}", *_OPTIONS, *text_options(text)]
    options += [f"--include-path={path}" for path in include_directories()]
    if text.startswith(_MARK):
        text = text.partition("\n")[2]  # so that lines are counted as their author does
    file = f"{name}.cu"
    program = _value(
        calling(nvrtc.nvrtcCreateProgram, text.encode(), file.encode(), 0, [], []), name
    )
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        words = _log(nvrtc, program, name)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(_refusal(name, arch, status.name, words, text, file))
        if words:
            log("kernels", f"NVRTC on {name}: {words}")
        image = bytes(_value(nvrtc.nvrtcGetCUBINSize(program), name))
        _value(nvrtc.nvrtcGetCUBIN(program, image), name)  # written into the object, as documented
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def join(texts: Sequence[str]) -> str:
    """One text that defines what all texts define, each in a namespace of its own."""
    includes = dict.fromkeys(line.strip() for text in texts for line in _INCLUDE.findall(text))
    parts = [
        f"namespace flame_text_{number} {{\n{_INCLUDE.sub('', text)}\n}}"
        for number, text in enumerate(texts)
    ]
    return "\n".join((*includes, *parts)) + "\n"


@functools.cache
def identity() -> str:
    """Changes whenever `compile_text` might give something else for the same text and target."""
    major, minor = version()
    packages = ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime")  # patches; the headers
    installed = [f"{name} {package_version(name) or 'of the system'}" for name in packages]
    return ", ".join((f"NVRTC {major}.{minor}", *installed, *_OPTIONS))


def version() -> tuple[int, int]:
    """NVRTC's version. Raises DeviceError where it is missing."""
    major, minor = _value(calling(bindings("nvrtc").nvrtcVersion), "nvrtcVersion")
    return int(major), int(minor)


def _value(result: tuple[Any, ...], name: str) -> Any:
    """What a call gave beside its status."""
    status, *values = result
    if int(status):
        raise CompileError(f"kernel {name}: NVRTC failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _log(nvrtc: Any, program: Any, name: str) -> str:
    size = _value(nvrtc.nvrtcGetProgramLogSize(program), name)
    words = bytes(size)
    _value(nvrtc.nvrtcGetProgramLog(program, words), name)
    return words.decode(errors="replace").strip("\0\n ")


def _refusal(name: str, arch: str, status: str, words: str, text: str, file: str) -> str:
    """NVRTC's words and the lines around the first fault, where it names a line."""
    message = f"NVRTC refused kernel {name} for {arch} ({status}): {words}"
    found = re.search(rf"{re.escape(file)}\((\d+)\): (?:catastrophic )?error", words)
    if found is None:
        return message
    fault = int(found.group(1))
    first = max(0, fault - 1 - _SHOWN_LINES)
    shown = "\n".join(
        f"{'>' if number == fault else ' '}{number:5} | {line}"
        for number, line in enumerate(text.splitlines()[first : fault + _SHOWN_LINES], first + 1)
    )
    return f"{message}\nthe source around line {fault}:\n{shown}"
