"""Single operations on a GPU: FLAME beside PyTorch eager and beside what the device can do.

    python benchmarks/gpu_ops.py [--only NAME...] [--compiled] [--turns 7] [--save [FOLDER]]
    python benchmarks/gpu_ops.py --device cpu --size tiny

Both run in one process on the same values, over several copies of the inputs in rotation, so that
no cache holds them, and in turns. Times are between events of the device around a burst of calls,
which queue behind a long product, so that what Python costs is not in them. The backward is timed
alone, on a graph that is kept. ``--compiled`` measures FLAME's compiled functions instead: forward,
and forward with backward as one program, beside PyTorch's two in a row.

``reached`` is the rate over the ceiling: over that of PyTorch's copy for what moves data, of its
product of 8192² matrices for what multiplies. ``error`` is ‖FLAME - PyTorch‖ / ‖PyTorch‖ over the
results; for random ones, the difference of their shares of zeros.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from gpu_cases import Case, Input, memory_cases, product_cases
from gpu_report import add_save, heading
from gpu_worker import library, synchronize, told

Call = Callable[[], Any]
ROTATE = 200 << 20  # bytes of inputs, four times the largest cache
COPIES = 16  # at most
QUEUE = 100e-6  # seconds that Python may need for a call, hidden behind the product before it
COMPARED = 1 << 20  # elements of each result
ERROR = 2e-2  # of bfloat16 results


@dataclass(frozen=True)
class Measured:
    """One line: a case in one phase."""

    name: str
    bytes: float
    flops: float
    exact: bool
    make: Callable[[Any, str], list[Call]]  # library, device -> a call for each copy of the inputs


def values(given: Input, seed: int) -> np.ndarray:
    """Normal float32 values or integers; large tensors repeat a block of a million."""
    random, count = np.random.default_rng(seed), math.prod(given.shape)
    if given.below:
        return random.integers(0, given.below, given.shape)
    block = random.standard_normal(min(count, 1_000_003), dtype=np.float32)
    return np.resize(block, given.shape)


def tensor(lib: Any, device: str, given: Input, seed: int) -> Any:
    made = lib.from_numpy(values(given, seed)).to(device)
    if not given.below:
        made = made.to(getattr(lib, given.dtype))
    if given.channels_last:
        made = made.to(memory_format=lib.channels_last)
    return made.requires_grad_() if given.grad else made


def copies_of(case: Case, most: int) -> int:
    return max(1, min(most, math.ceil(ROTATE / sum(given.bytes for given in case.inputs))))


def lines_of(case: Case, *, compiled: bool) -> list[Measured]:
    """The phases of a case that are measured."""
    backward = any(given.grad for given in case.inputs)
    most = 4 if compiled else COPIES

    def make(phase: str) -> Callable[[Any, str], list[Call]]:
        def calls(lib: Any, device: str) -> list[Call]:
            return [one_call(lib, device, case, phase, i) for i in range(copies_of(case, most))]

        return calls

    fixed = (case.exact,)
    found = []
    if case.forward:
        rates = (case.forward_bytes, case.flops)
        found.append(Measured(case.name, *rates, *fixed, make("compiled" if compiled else "eager")))
    if backward and not compiled:
        rates = (case.backward_bytes, case.backward_flops)
        found.append(Measured(f"{case.name}: backward", *rates, *fixed, make("backward")))
    if backward and compiled:
        rates = (case.forward_bytes + case.backward_bytes, case.flops + case.backward_flops)
        found.append(Measured(f"{case.name}: both", *rates, *fixed, make("both")))
    return found


def one_call(lib: Any, device: str, case: Case, phase: str, seed: int) -> Call:
    """A call on its own copy of the inputs; PyTorch is not compiled."""
    given = [tensor(lib, device, g, 100 * seed + i) for i, g in enumerate(case.inputs)]
    wanted = [t for t, g in zip(given, case.inputs, strict=True) if g.grad]

    def forward() -> Any:
        with lib.no_grad():
            return case.call(lib, *given)

    if phase in ("eager", "compiled"):
        is_flame = lib.__name__ == "flame"
        return lib.compile(forward) if phase == "compiled" and is_flame else forward
    output = case.call(lib, *given)
    gradient = output.detach().clone()  # of its dtype, layout and device, and not zero
    if phase == "backward":
        return lambda: lib.autograd.grad(output, wanted, gradient, retain_graph=True)

    def both() -> Any:
        again = case.call(lib, *given)
        return again, *lib.autograd.grad(again, wanted, gradient)

    return lib.compile(both) if lib.__name__ == "flame" else both


def adamw_line(size: str, *, compiled: bool) -> Measured:
    """The update of the parameters of GPT-2, PyTorch's fused one beside it."""
    width, layers, words = (768, 12, 50304) if size == "full" else (16, 2, 40)
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [(words, width), *(s for s in [*block, (width,), (width,)] for _ in range(layers))]
    count = sum(math.prod(shape) for shape in shapes)

    def make(lib: Any, device: str) -> list[Call]:
        parameters = []
        for i, shape in enumerate(shapes):
            parameter = tensor(lib, device, Input(shape, "float32", grad=True), i)
            parameter.grad = tensor(lib, device, Input(shape, "float32"), 1000 + i)
            parameters.append(parameter)
        fused = {"fused": True} if lib.__name__ == "torch" else {}
        optimizer = lib.optim.AdamW(parameters, lr=1e-3, **fused)

        def step() -> Any:
            optimizer.step()
            return parameters[0].detach()

        return [lib.compile(step) if compiled and lib.__name__ == "flame" else step]

    return Measured(f"AdamW, {count / 1e6:.0f}M parameters", 28 * count, 0, True, make)


class Clock:
    """Times bursts of one library's calls."""

    def __init__(self, lib: Any, device: str) -> None:
        self.lib, self.device = lib, device
        if device != "cpu":
            side = Input((8192, 8192))
            self.matrix = tensor(lib, device, side, 0)

    def burst(self, calls: Sequence[Call], count: int) -> float:
        """Milliseconds of one of ``count`` calls in rotation."""
        if self.device == "cpu":
            start = time.perf_counter()
            for i in range(count):
                calls[i % len(calls)]()
            return (time.perf_counter() - start) / count * 1e3
        start, end = (self.lib.cuda.Event(enable_timing=True) for _ in range(2))
        self._occupy(count * QUEUE)
        start.record()
        for i in range(count):
            calls[i % len(calls)]()
        end.record()
        self.lib.cuda.synchronize()
        return float(start.elapsed_time(end)) / count

    def _occupy(self, seconds: float) -> None:
        """Give the device work for so long: a product of this size takes it over 1.4 ms."""
        with self.lib.no_grad():
            for _ in range(math.ceil(seconds / 1.4e-3)):
                self.lib.matmul(self.matrix, self.matrix)

    def prepare(self, calls: Sequence[Call]) -> int:
        """Warm up; how many calls make a burst of about 10 ms, 100 at most: a device
        queues 1024 kernels."""
        for call in (*calls, *calls):
            call()
        synchronize(self.lib, self.device)
        return max(3, min(100, math.ceil(10 / self.burst(calls, 3))))


def array(result: Any) -> np.ndarray:
    """The first elements of a tensor, as float64."""
    found: np.ndarray = result.detach().reshape(-1)[:COMPARED].float().cpu().numpy()
    return found.astype(np.float64)


def difference(line: Measured, mine: Any, theirs: Any) -> float:
    """How far two results are apart; infinite where one is not finite."""
    pairs = list(zip(as_tuple(mine), as_tuple(theirs), strict=True))
    errors = []
    for ours, expected in ((array(a), array(b)) for a, b in pairs):
        if not line.exact:
            errors.append(abs(float((ours == 0).mean() - (expected == 0).mean())))
            continue
        error = np.linalg.norm(ours - expected) / max(float(np.linalg.norm(expected)), 1e-30)
        errors.append(float(error) if np.isfinite(error) else math.inf)
    return max(errors)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Times:
    """Medians, milliseconds."""

    torch: float
    flame: float
    error: float


def compare(line: Measured, clocks: dict[str, Clock], turns: int) -> Times:
    """Both libraries in turns."""
    calls = {name: line.make(clock.lib, clock.device) for name, clock in clocks.items()}
    error = difference(line, *(calls[name][0]() for name in ("flame", "torch")))
    counts = {name: clock.prepare(calls[name]) for name, clock in clocks.items()}
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(turns):
        for name, clock in clocks.items():
            times[name].append(clock.burst(calls[name], counts[name]))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return Times(medians["torch"], medians["flame"], error)


@dataclass(frozen=True)
class Ceilings:
    """Rates that the device reaches: bytes/s of a copy, flop/s of a large product."""

    bytes: float
    flops: float


def ceilings(clock: Clock, size: str, turns: int) -> Ceilings:
    copy = next(case for case in memory_cases(size) if case.name == "copy")
    product = [case for case in product_cases(size) if case.name.startswith("matmul")][-1]
    rates = []
    for case in (copy, product):
        line = lines_of(case, compiled=False)[0]
        calls = line.make(clock.lib, clock.device)
        count = clock.prepare(calls)
        best = min(clock.burst(calls, count) for _ in range(turns))
        rates.append((line.bytes or line.flops) / best * 1e3)
    return Ceilings(*rates)


def row(line: Measured, found: Times, ceiling: Ceilings) -> str:
    """One line of the table."""
    moves = bool(line.bytes)
    amount, unit, scale = (line.bytes, "GB/s", 1e9) if moves else (line.flops, "TFLOP/s", 1e12)
    rates = [amount / ms * 1e3 for ms in (found.torch, found.flame)]
    wrong = found.error > ERROR
    cells = [
        line.name,
        f"{found.torch:.4g}",
        f"{found.flame:.4g}",
        f"**{found.flame / found.torch:.2f}**",
        f"{rates[0] / scale:.4g}",
        f"{rates[1] / scale:.4g} {unit}",
        f"{rates[1] / (ceiling.bytes if moves else ceiling.flops):.0%}",
        f"**WRONG: {found.error:.1e}**" if wrong else f"{found.error:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = ("operation", "PyTorch ms", "FLAME ms", "ratio", "PyTorch", "FLAME", "reached", "error")


def run(lines: list[Measured], clocks: dict[str, Clock], size: str, turns: int) -> list[str]:
    """The table, printed as it is made; what fails is a line of its own."""
    ceiling = ceilings(clocks["torch"], size, turns)
    copy, product = f"{ceiling.bytes / 1e9:.4g} GB/s", f"{ceiling.flops / 1e12:.4g} TFLOP/s"
    made = [
        f"Ceilings: copy {copy}, product {product}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join('---' for _ in COLUMNS)} |",
    ]
    print("\n".join(made), flush=True)
    for line in lines:
        try:
            made.append(row(line, compare(line, clocks, turns), ceiling))
        except Exception as error:  # noqa: BLE001 - every failure is shown, and the others go on
            blanks = " | ".join("–" for _ in COLUMNS[2:])
            made.append(f"| {line.name} | {blanks} | {told(error).replace('|', '/')} |")
        print(made[-1], flush=True)
        if clocks["torch"].device != "cpu":
            clocks["torch"].lib.cuda.empty_cache()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="operations whose names begin so")
    parser.add_argument("--compiled", action="store_true", help="FLAME's compiled functions")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda")
    add_save(parser)
    args = parser.parse_args()
    cases = [*memory_cases(args.size), *product_cases(args.size)]
    lines = [line for case in cases for line in lines_of(case, compiled=args.compiled)]
    lines.append(adamw_line(args.size, compiled=args.compiled))
    if args.only:
        lines = [line for line in lines if line.name.startswith(tuple(args.only))]
    clocks = {name: Clock(library(name), args.device) for name in ("torch", "flame")}
    versions = {name: str(clock.lib.__version__) for name, clock in clocks.items()}
    title = heading(versions, args.device)
    print(title, flush=True)
    made = [title, "", *run(lines, clocks, args.size, args.turns)]
    if args.save is not None:
        mode = "_compiled" if args.compiled else ""
        target = args.save / f"gpu_ops{mode}.md"
        target.write_text("\n".join(["# Single operations on a GPU", "", *made, ""]))


if __name__ == "__main__":
    main()
