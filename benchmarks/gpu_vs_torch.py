"""Whole training steps on a GPU: FLAME compiled beside PyTorch, eager and compiled, in one run.

    python benchmarks/gpu_vs_torch.py [--models gpt2 dit] [--turns 5] [--save [FOLDER]]
    python benchmarks/gpu_vs_torch.py --rivals eager            without torch.compile
    python benchmarks/gpu_vs_torch.py --device cpu --size tiny --precision float32

A step is forward, loss, backward, AdamW (PyTorch's fused one), on the same batch and from the same
weights: under bfloat16 autocast the large models, in float32 the two small ones; convolutional
models are channels-last. Each library runs in a process of its own, and they step in turns: a turn
is some untimed steps, then as many as take about half a second, ended by a synchronization; times
are medians over the turns. ``ratio`` is FLAME over the best rival. The first step has empty caches;
``flame warm`` is a second process, with the caches of the first. Memory is what each library says
that it allocated at most in the steps after the first five. The losses of those five must agree
with PyTorch's eager ones, or the line is of no worth and says so. What fails, for want of memory or
of a function, shows the kind of its error in its cells; the others go on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_losses import agreement
from gpu_models import BENCHMARKS, SIZES, Benchmark
from gpu_remote import Failed, Remote
from gpu_report import add_save, heading

RIVALS = {"eager": "torch eager", "compile": "torch compiled"}
FLAME = {"compiled": "flame compiled", "eager": "flame eager"}
WARM = "flame warm"
LOSSES = 5


@dataclass
class Found:
    """What one process found of one model; a failure stands in ``error``."""

    first: float = math.nan  # seconds
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # milliseconds, one a turn
    memory: float = math.nan  # GiB, after the first steps
    memory_first: float = math.nan  # GiB, in the first steps
    error: str = ""

    @property
    def ms(self) -> float:
        return statistics.median(self.times) if self.times and not self.error else math.nan


@dataclass(frozen=True)
class Options:
    """How a run is made."""

    kinds: tuple[str, ...]
    warm: bool
    size: str
    device: str
    precision: str
    turns: int
    seconds: float  # of the steps in a turn
    patience: float  # seconds that one command may take


class Session:
    """All kinds on one model, a process each. A kind that fails is left out from there on."""

    def __init__(self, name: str, options: Options, caches: Path) -> None:
        self.options = options
        self.kinds = {kind: kind for kind in options.kinds}
        if options.warm:
            self.kinds[WARM] = flame_kind(options)
        self.found = {label: Found() for label in self.kinds}
        settings = (name, options.size, options.device, options.precision)
        self.workers = {label: Remote(k, *settings, caches) for label, k in self.kinds.items()}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def ask(self, label: str, command: str, **arguments: Any) -> dict[str, Any] | None:
        """The answer of one, or None where it has failed."""
        if not self.found[label].error:
            self.workers[label].send(command, **arguments)
        return self.answer(label)

    def ask_all(self, command: str) -> dict[str, dict[str, Any] | None]:
        """The answers of all, which work at the same time."""
        for label, found in self.found.items():
            if not found.error:
                self.workers[label].send(command)
        return {label: self.answer(label) for label in self.kinds}

    def answer(self, label: str) -> dict[str, Any] | None:
        if self.found[label].error:
            return None
        try:
            return self.workers[label].answer(self.options.patience)
        except Failed as failure:
            self.found[label].error = str(failure)
            print(f"{label}: {failure}\n{self.workers[label].said()}", file=sys.stderr)
            self.workers[label].close()  # its memory is free for the others
            return None

    def first_steps(self) -> None:
        """One kind after the other, FLAME with warm caches last."""
        for label, found in self.found.items():
            answer = self.ask(label, "first", steps=LOSSES)
            if answer is not None:
                found.first, found.losses = answer["seconds"], answer["losses"]
                found.memory_first = number(answer["gib"])
        if WARM in self.workers:
            self.workers[WARM].close()

    def turns(self) -> None:
        timed = [label for label in self.kinds if label != WARM]
        for _ in range(self.options.turns):
            for label in timed:
                answer = self.ask(label, "turn", seconds=self.options.seconds)
                if answer is not None:
                    self.found[label].times.append(answer["ms"])
        for label in timed:
            answer = self.ask(label, "peak")
            if answer is not None:
                self.found[label].memory = number(answer["gib"])


def measure(
    name: str, options: Options, caches: Path, versions: dict[str, str]
) -> dict[str, Found]:
    """All kinds on one model; ``versions`` gets those of the libraries."""
    session = Session(name, options, caches)
    try:
        for answer in session.ask_all("start").values():
            if answer is not None:
                versions[answer["library"]] = answer["version"]
        session.ask_all("build")
        session.first_steps()
        session.turns()
    finally:
        session.close()
    return session.found


def flame_kind(options: Options) -> str:
    """The kind of FLAME that is measured; empty where none is."""
    return next((kind for kind in options.kinds if kind.startswith("flame")), "")


def number(value: float | None) -> float:
    return math.nan if value is None else value


def shown(value: float, found: Found | None = None, digits: int = 3) -> str:
    """A figure; the kind of the failure where there was one; a dash where there is none."""
    if not math.isnan(value):
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    if found is not None and found.error:
        return found.error.partition(":")[0]
    return "–"


def row(
    name: str, benchmark: Benchmark, options: Options, found: dict[str, Found]
) -> tuple[str, list[str]]:
    """One line of the table, and what must be said below it."""
    ours = found.get(flame_kind(options), Found())
    rivals = [found[kind].ms for kind in options.kinds if kind.startswith("torch")]
    best = min((ms for ms in rivals if not math.isnan(ms)), default=math.nan)
    ratio = ours.ms / best
    mixed = benchmark.mixed and options.precision == "mixed"
    verdict, notes = agreement({k: f.losses for k, f in found.items() if f.losses}, mixed=mixed)
    cells = [
        name,
        *(shown(found[kind].ms, found[kind]) for kind in options.kinds),
        "–" if math.isnan(ratio) else f"**{ratio:.2f}**",
        *goals(benchmark, options, ours),
        " / ".join(shown(benchmark.items / ms * 1e3) for ms in (best, ours.ms))
        + f" {benchmark.unit}",
        " / ".join(shown(found[kind].memory, found[kind]) for kind in options.kinds),
        " / ".join(shown(f.first, f) for f in found.values()),
        verdict,
    ]
    notes += [f"{kind} failed: {f.error}" for kind, f in found.items() if f.error]
    if options.device != "cpu":
        heaviest = " / ".join(shown(f.memory_first, f) for f in found.values())
        notes.append(f"peak GiB of the first steps: {heaviest}")
    return f"| {' | '.join(cells)} |", [f"- {name}: {note}" for note in notes]


def goals(benchmark: Benchmark, options: Options, ours: Found) -> tuple[str, str]:
    """The targets, and whether they are met; they are for the full size on a GPU."""
    if options.size != "full" or options.device == "cpu":
        return "–", "–"
    wanted = [(benchmark.target, ours.ms, "ms"), (benchmark.target_memory, ours.memory, "GiB")]
    wanted = [goal for goal in wanted if not math.isnan(goal[0])]
    met = ["yes" if value <= target else "**no**" for target, value, _ in wanted]
    return ", ".join(f"{shown(t)} {unit}" for t, _, unit in wanted), ", ".join(met)


def columns(options: Options) -> list[str]:
    kinds = " / ".join(options.kinds)
    firsts = kinds + (f" / {WARM}" if options.warm else "")
    return [
        "model",
        *(f"{kind} ms" for kind in options.kinds),
        "ratio",
        "target",
        "met",
        "items/s, best rival / FLAME",
        f"peak GiB, {kinds}",
        f"first step s, {firsts}",
        "losses agree",
    ]


def run(models: list[str], options: Options, budget: float, target: Path | None) -> None:
    """Print the report as it is made, and write it to ``target`` after each model, as far as it
    goes. No model is begun past the budget."""
    start = time.perf_counter()
    names = columns(options)
    head = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    rows: list[str] = []
    notes: list[str] = []
    versions: dict[str, str] = {}
    print("\n".join(head), flush=True)
    for name in models:
        begun = time.perf_counter()
        if begun - start > budget:
            line, said = "", [f"- {name}: not run, as the time was spent"]
        else:
            with tempfile.TemporaryDirectory() as caches:
                found = measure(name, options, Path(caches), versions)
            line, said = row(name, BENCHMARKS[name](options.size), options, found)
        print("\n".join([line, *said]), f"({time.perf_counter() - begun:.0f} s)", flush=True)
        rows += [line] if line else []
        notes += said
        if target is not None:
            title = f"{heading(versions, options.device)}. Medians of {options.turns} turns."
            lines = ["# Training steps on a GPU", "", title, "", *head, *rows, "", *notes, ""]
            target.write_text("\n".join(lines))
    print(heading(versions, options.device))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--flame", choices=[*FLAME, "none"], default="compiled")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed steps in a turn")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("mixed", "float32"), default="mixed")
    parser.add_argument("--no-warm", action="store_true", help="leave out the second first step")
    parser.add_argument("--patience", type=float, default=180, help="seconds for one answer")
    parser.add_argument("--budget", type=float, default=420, help="seconds; no model begins later")
    add_save(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    mine = () if args.flame == "none" else (FLAME[args.flame],)
    options = Options(
        kinds=(*(RIVALS[rival] for rival in args.rivals), *mine),
        warm=bool(mine) and not args.no_warm,
        size=args.size,
        device=args.device,
        precision=args.precision,
        turns=args.turns,
        seconds=args.seconds,
        patience=args.patience,
    )
    if not options.kinds:
        sys.exit("nothing to measure: give a rival, or FLAME")
    target = None
    if args.save is not None:  # a part of the models does not replace the whole table
        part = "" if args.models == list(BENCHMARKS) else "_" + "_".join(args.models)
        target = args.save / f"gpu_vs_torch{part}.md"
    run(args.models, options, args.budget, target)


if __name__ == "__main__":
    main()
