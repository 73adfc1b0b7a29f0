"""LLVM IR text to machine code. Invariant: an address from `load` is good until the process ends.

Code is never unloaded, so a finalizer that runs late at interpreter exit can still launch. Each
text becomes a library of its own: symbols of different texts never meet.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from flame.core.errors import CompileError
from flame.runtime.cpu import amx
from flame.runtime.cpu.cache import FORMAT_VERSION, DiskCache, Entry, default_directory
from flame.runtime.cpu.emission import compile_threads, emit, new_machine, over_machines


@dataclass
class Statistics:
    """How kernels were obtained, and the seconds spent on everything but memory hits."""

    compiled: int = 0
    disk_hits: int = 0
    memory_hits: int = 0
    seconds: float = 0.0


class Lock(Protocol):
    """What is asked of a reentrant lock."""

    def acquire(self) -> bool: ...

    def release(self) -> None: ...


class Compiler:
    """llvmlite with the host's CPU, a memory and a disk cache. Several threads may use it."""

    def __init__(self, disk: DiskCache) -> None:
        # llvmlite takes tens of milliseconds to import: only the first kernel pays for it.
        import llvmlite
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        # Without the parser, inline assembly in a kernel would end the process.
        binding.initialize_native_asmparser()
        self.disk = disk
        self.statistics = Statistics()
        self.cpu_name: str = binding.get_host_cpu_name()
        self.cpu_features: str = binding.get_host_cpu_features().flatten()
        llvm_version = ".".join(map(str, binding.llvm_version_info))
        self.version = f"llvmlite {llvmlite.__version__}, LLVM {llvm_version}"
        self._binding: Any = binding
        self._machine: Any = new_machine(self.cpu_name, self.cpu_features)
        self._machines = [self._machine]  # more where several kernels are compiled at once
        self._quick_machine: Any = new_machine(self.cpu_name, self.cpu_features, quick=True)
        # Alignments and calling conventions are the host's, not LLVM's defaults. No line break, so
        # that LLVM counts lines as the source does.
        layout, triple = self._machine.target_data, self._machine.triple
        self._target = f'target datalayout = "{layout}" target triple = "{triple}" '
        # What decides the machine code of a text.
        # `amx.status` also asks for the matrix unit, which kernels from disk use without asking.
        parts = (self.version, self.cpu_name, self.cpu_features, self._target, amx.status())
        self.identity = "\n".join((str(FORMAT_VERSION), *parts))
        self._linker: Any = binding.create_lljit_compiler(self._machine)
        _keep_forever(self._linker)
        self._addresses: dict[tuple[str, tuple[str, ...], bool], tuple[int, ...]] = {}
        self._libraries = 0
        self.lock = threading.RLock()

    def load(
        self, source: str, symbols: tuple[str, ...], *, quick: bool = False
    ) -> tuple[int, ...]:
        """The addresses of `symbols`, functions or globals that `source` defines.

        quick: slow code will do, where no better is known.
        """
        with self.lock:
            for level in (False, True) if quick else (False,):
                if (known := self._addresses.get((source, symbols, level))) is not None:
                    self.statistics.memory_hits += 1
                    return known
            started = time.perf_counter()
            entry, level = self._obtain(source, symbols, quick=quick)
            addresses = self._link([entry], source, symbols)
            self._addresses[source, symbols, level] = addresses
            self.statistics.seconds += time.perf_counter() - started
            return addresses

    def _obtain(self, source: str, symbols: tuple[str, ...], *, quick: bool) -> tuple[Entry, bool]:
        """Machine code from disk or from LLVM, and whether it is of the quick kind."""
        for level in (False, True) if quick else (False,):
            if (entry := self.disk.read(self._key(source, quick=level))) is not None:
                self.statistics.disk_hits += 1
                return entry, level
        machine = self._quick_machine if quick else self._machine
        entry = self._compile(machine, source, symbols)
        self._keep(self._key(source, quick=quick), entry, symbols[0])
        return entry, quick

    def load_many(self, sources: Sequence[tuple[str, str]]) -> list[int]:
        """The addresses of one function each of many texts: (text, symbol).

        What neither cache has is compiled in several threads; all of it becomes one library, so
        what texts define beside their symbols must be internal to them.
        """
        with self.lock:
            started = time.perf_counter()
            identities = [(source, (symbol,), False) for source, symbol in sources]
            new = list(dict.fromkeys(i for i in identities if i not in self._addresses))
            self.statistics.memory_hits += len(sources) - len(new)
            if new:
                keys = [self._key(source, quick=False) for source, _, _ in new]
                entries = [self.disk.read(key) for key in keys]
                self.statistics.disk_hits += sum(entry is not None for entry in entries)
                missing = [i for i, entry in enumerate(entries) if entry is None]
                compiled = self._compile_many([new[i][:2] for i in missing])
                for i, entry in zip(missing, compiled, strict=True):
                    entries[i] = entry
                    self._keep(keys[i], entry, new[i][1][0])
                found = [entry for entry in entries if entry is not None]
                addresses = self._link(found, new[0][0], tuple(i[1][0] for i in new))
                for identity, address in zip(new, addresses, strict=True):
                    self._addresses[identity] = (address,)
                self.statistics.seconds += time.perf_counter() - started
            return [self._addresses[identity][0] for identity in identities]

    def _keep(self, key: str, entry: Entry, symbol: str) -> None:
        for name in entry.externals:
            self._resolve(name, symbol)
        self.statistics.compiled += 1
        self.disk.write(key, entry)

    def _compile_many(self, sources: Sequence[tuple[str, tuple[str, ...]]]) -> list[Entry]:
        wanted = min(compile_threads(), len(sources))
        while len(self._machines) < wanted:
            self._machines.append(new_machine(self.cpu_name, self.cpu_features))

        def work(machine: Any, source: tuple[str, tuple[str, ...]]) -> Entry:
            return self._compile(machine, *source)

        return over_machines(self._machines[: max(wanted, 1)], work, sources)

    def _key(self, source: str, *, quick: bool) -> str:
        text = f"{self.identity}\n{'quick' if quick else 'plain'}\n{source}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _compile(self, machine: Any, source: str, symbols: tuple[str, ...]) -> Entry:
        context = self._binding.create_context()
        try:
            module = self._binding.parse_assembly(self._target + source, context)
            module.verify()
        except RuntimeError as error:
            raise CompileError(_refusal(symbols[0], source, str(error))) from None
        values = [*module.functions, *module.global_variables]
        defined = {value.name for value in values if not value.is_declaration}
        for symbol in symbols:
            if symbol not in defined:
                raise CompileError(
                    f"kernel {symbol}: the source does not define this symbol; it defines "
                    f"{sorted(defined)}"
                )
        externals = tuple(
            sorted(
                value.name
                for value in values
                if value.is_declaration and not value.name.startswith("llvm.")
            )
        )
        return Entry(emit(machine, module), externals)

    def _resolve(self, name: str, symbol: str) -> int | None:
        """The address of a registered name; None for one that the process itself has."""
        if (provider := _providers.get(name)) is not None:
            return provider()
        if self._binding.address_of_symbol(name) is None:
            raise CompileError(
                f"kernel {symbol}: it declares {name}, which neither this process nor the runtime "
                f"has; the runtime offers {sorted(_providers)} and what libc and libm export"
            )
        return None

    def _link(
        self, entries: Sequence[Entry], source: str, symbols: tuple[str, ...]
    ) -> tuple[int, ...]:
        library = self._binding.JITLibraryBuilder()
        for entry in entries:
            library.add_object_img(entry.machine_code)
        library.add_current_process()
        for name in dict.fromkeys(name for entry in entries for name in entry.externals):
            if (address := self._resolve(name, symbols[0])) is not None:
                library.import_symbol(name, address)
        for symbol in symbols:
            library.export_symbol(symbol)
        self._libraries += 1
        try:
            tracker = library.link(self._linker, f"flame_{os.getpid()}_{self._libraries}")
        except RuntimeError as error:
            raise CompileError(_refusal(symbols[0], source, str(error))) from None
        _keep_forever(tracker)
        return tuple(int(tracker[symbol]) for symbol in symbols)


_providers: dict[str, Callable[[], int]] = {}


def register_symbol(name: str, provider: Callable[[], int]) -> None:
    """Let kernels `declare` the function `name`; `provider` gives its address when one does."""
    _providers[name] = provider


def _keep_forever(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _refusal(symbol: str, source: str, reason: str) -> str:
    """LLVM's words and the lines around the fault, where LLVM names a line."""
    message = f"LLVM refused kernel {symbol}: {reason.strip()}"
    found = re.search(r"<string>:(\d+):", reason)
    if found is None:
        return message
    lines = source.splitlines()
    fault = int(found.group(1))
    first = max(0, fault - 4)
    shown = "\n".join(
        f"{'>' if number == fault else ' '}{number:5} | {line}"
        for number, line in enumerate(lines[first : fault + 3], first + 1)
    )
    return f"{message}\nthe source around line {fault}:\n{shown}"


@cache
def _shared() -> Compiler:
    compiler = Compiler(DiskCache(default_directory() / "cpu"))
    hold_over_forks(compiler.lock)
    return compiler


def hold_over_forks(lock: Lock) -> None:
    """Keep a child from inheriting `lock` locked by a thread that it does not have."""
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )


_creation = threading.RLock()
hold_over_forks(_creation)


def compiler() -> Compiler:
    """The process's compiler, made at the first call."""
    with _creation:
        return _shared()


def load(source: str, symbol: str, *, quick: bool = False) -> int:
    """The address of the function `symbol` that the LLVM IR text `source` defines.

    Compiled for the host's CPU at code generation level 2; with `quick` at level 0, in a third of
    the time, unless a cache has the better code. The result is cached in memory and on disk by
    text. Raises CompileError where LLVM refuses the text or a declared name does not exist.
    """
    return compiler().load(source, (symbol,), quick=quick)[0]


def load_many(sources: Sequence[tuple[str, str]]) -> list[int]:
    """As `load`, for many (text, symbol) at once: several threads compile what is not cached.

    Apart from its symbol, a text may define only what is internal to it.
    """
    return compiler().load_many(sources)


def load_symbols(source: str, symbols: tuple[str, ...]) -> tuple[int, ...]:
    """As `load`, for several functions or globals of one text, in the order of `symbols`."""
    return compiler().load(source, symbols)


def statistics() -> Statistics:
    """A copy of the counters of this process."""
    return replace(compiler().statistics)
