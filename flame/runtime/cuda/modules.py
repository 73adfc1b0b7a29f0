"""CUDA C++ text to kernels on a device. Invariant: a handle from `load` is good until the process
ends; modules are never unloaded.

Machine code depends on text, compiler and compute capability, so it is shared by devices and kept
on disk; modules and functions belong to one device. Texts that are compiled together are joined
into few programs, as NVRTC takes as long to begin as to compile a few kernels; the disk then holds
an entry for each text that names the joint one.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, TypeVar

from flame.core.errors import CompileError
from flame.core.log import log
from flame.runtime.cpu.cache import DiskCache, Entry, default_directory
from flame.runtime.cpu.emission import compile_threads
from flame.runtime.cuda.driver import Driver, per_driver
from flame.runtime.cuda.nvrtc import text_options

FORMAT_VERSION: Final = 1
JOINED: Final = 16  # texts of one program, at most
_JOINT: Final = "joint"  # marks an entry that names another one

T = TypeVar("T")
Request = tuple[str, str, int]  # text, symbol, bytes of dynamic shared memory

# What reaches beyond a namespace, or cannot be told.
_DIRECTIVE = re.compile(
    r"^\s*#\s*(?!(?:include|pragma|if|ifdef|ifndef|elif|else|endif)\b)", re.MULTILINE
)


@dataclass
class Statistics:
    """How kernels were obtained, and the seconds spent on everything but memory hits.

    ``compiled`` and ``disk_hits`` count texts, ``programs`` the runs of the compiler.
    """

    compiled: int = 0
    programs: int = 0
    disk_hits: int = 0
    memory_hits: int = 0
    seconds: float = 0.0


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Modules:
    """The kernels of one driver, with a memory and a disk cache. Several threads may use it."""

    def __init__(self, made: Driver, disk: DiskCache) -> None:
        self.driver, self.disk = made, disk
        self.statistics = Statistics()
        self.lock = threading.RLock()
        # The same object for all texts of a program, so that it is loaded once.
        self._images: dict[tuple[tuple[int, int], str], bytes] = {}
        self._distinct: dict[bytes, bytes] = {}
        self._modules: dict[tuple[int, bytes], int] = {}
        self._functions: dict[tuple[int, str, str, int], int] = {}

    def load(self, device: int, text: str, symbol: str, shared: int) -> int:
        """One kernel; see `load`."""
        known = self._functions.get((device, text, symbol, shared))
        if known is not None:
            self.statistics.memory_hits += 1
            return known
        return self.load_many(device, [(text, symbol, shared)])[0]

    def load_many(self, device: int, requests: Sequence[Request]) -> list[int]:
        """Many kernels; see `load_many`."""
        with self.lock:
            started = time.perf_counter()
            new = self._new(device, requests)
            self.statistics.memory_hits += len(requests) - len(new)
            if new:
                capability = self._obtain_all(device, new)
                for text, symbol, shared in new:
                    module = self._module(device, self._images[capability, text])
                    handle = self.driver.function(module, symbol, shared)
                    self._functions[device, text, symbol, shared] = handle
                self.statistics.seconds += time.perf_counter() - started
            return [self._functions[device, *request] for request in requests]

    def compile_many(self, device: int, requests: Sequence[Request]) -> None:
        """See `compile_many`."""
        with self.lock:
            started = time.perf_counter()
            self._obtain_all(device, self._new(device, requests))
            self.statistics.seconds += time.perf_counter() - started

    def _new(self, device: int, requests: Sequence[Request]) -> list[Request]:
        return [r for r in dict.fromkeys(requests) if (device, *r) not in self._functions]

    def _obtain_all(self, device: int, requests: Sequence[Request]) -> tuple[int, int]:
        """Machine code of all requests for the device's compute capability, which it returns."""
        capability = self.driver.properties(device).capability
        symbols: dict[str, str] = {}
        for text, symbol, _ in requests:
            symbols.setdefault(text, symbol)
        self._obtain(capability, symbols)
        return capability

    def _module(self, device: int, image: bytes) -> int:
        key = (device, image)
        if key not in self._modules:
            self._modules[key] = self.driver.load_module(device, image)
        return self._modules[key]

    def _obtain(self, capability: tuple[int, int], symbols: dict[str, str]) -> None:
        """Machine code of all texts, from memory, disk or the compiler."""
        missing = []
        for text in symbols:
            if (capability, text) in self._images:
                continue
            image = self._read(self._key(capability, text))
            if image is None:
                missing.append(text)
            else:
                self.statistics.disk_hits += 1
                self._images[capability, text] = self._distinct.setdefault(image, image)
        if not missing:
            return
        groups = joined_groups([(text, symbols[text]) for text in missing], compile_threads())
        if len(groups) == 1:
            made = [self._compile(capability, groups[0])]
        else:
            with ThreadPoolExecutor(min(compile_threads(), len(groups)), "flame-nvrtc") as threads:
                waits = [meanwhile(threads, self._compile, capability, group) for group in groups]
                made = [wait() for wait in waits]
        for texts, image in (program for programs in made for program in programs):
            self._keep(capability, texts, image)

    def _compile(
        self, capability: tuple[int, int], group: Sequence[tuple[str, str]]
    ) -> list[tuple[list[str], bytes]]:
        """The texts of each program and its machine code."""
        texts = [text for text, _ in group]
        if len(group) > 1:
            try:
                return [(texts, self.driver.compile_together(texts, group[0][1], capability))]
            except CompileError as error:
                # Either a text is wrong, which the next lines tell in its own words, or texts do
                # not go together, which costs time alone.
                log("kernels", f"texts are compiled one by one: {error}")
        return [([text], self.driver.compile(text, symbol, capability)) for text, symbol in group]

    def _keep(self, capability: tuple[int, int], texts: Sequence[str], image: bytes) -> None:
        self.statistics.compiled += len(texts)
        self.statistics.programs += 1
        keys = [self._key(capability, text) for text in texts]
        if len(texts) == 1:
            self.disk.write(keys[0], Entry(image, ()))
        else:
            joint = _digest(_JOINT, *keys)
            self.disk.write(joint, Entry(image, ()))
            for key in keys:
                self.disk.write(key, Entry(b"", (_JOINT, joint)))
        for text in texts:
            self._images[capability, text] = image

    def _read(self, key: str) -> bytes | None:
        entry = self.disk.read(key)
        if entry is not None and entry.externals[:1] == (_JOINT,):
            entry = self.disk.read(entry.externals[1])
        return None if entry is None else entry.machine_code

    def _key(self, capability: tuple[int, int], text: str) -> str:
        identity = self.driver.compiler_identity()
        return _digest(str(FORMAT_VERSION), identity, f"{capability[0]}.{capability[1]}", text)


def meanwhile(threads: ThreadPoolExecutor, work: Callable[..., T], *given: Any) -> Callable[[], T]:
    """Begin with some work in a thread; what is returned waits for its result. Where no thread can
    begin any more, as the interpreter is about to end, it is done in waiting."""
    try:
        return threads.submit(work, *given).result
    except RuntimeError:
        return partial(work, *given)


def joined_groups(texts: Sequence[tuple[str, str]], threads: int) -> list[list[tuple[str, str]]]:
    """(text, symbol) pairs in groups to be compiled together, enough of them for all threads.

    A text with macros, which know no namespaces, or with options of its own stands alone.
    """
    alone, free = [], []
    seen: set[str] = set()
    for text, symbol in texts:
        if symbol in seen or _DIRECTIVE.search(text) or text_options(text):
            alone.append([(text, symbol)])
        else:
            seen.add(symbol)
            free.append((text, symbol))
    size = min(JOINED, max(1, -(-len(free) // threads)))
    return [*alone, *(free[i : i + size] for i in range(0, len(free), size))]


@per_driver
def modules(made: Driver) -> Modules:
    """The kernels of this process's driver."""
    return Modules(made, DiskCache(default_directory() / "cuda"))


def load(device: int, text: str, symbol: str, shared: int = 0) -> int:
    """A function handle of the kernel ``symbol`` that the CUDA C++ ``text`` defines as extern "C",
    to be launched with at most ``shared`` bytes of dynamic shared memory.

    The result is cached in memory and on disk by text. Raises CompileError where NVRTC refuses the
    text, CudaError where the device refuses what was made of it.
    """
    return modules().load(device, text, symbol, shared)


def load_many(device: int, requests: Sequence[Request]) -> list[int]:
    """As `load`, for many (text, symbol, shared) at once: what is not cached is compiled in several
    threads."""
    return modules().load_many(device, requests)


def compile_many(device: int, requests: Sequence[Request]) -> None:
    """Make the machine code of what `load_many` is to load. No context has to be current, so a
    thread of its own can do it."""
    modules().compile_many(device, requests)


def statistics() -> Statistics:
    """A copy of the counters of this process."""
    return replace(modules().statistics)
