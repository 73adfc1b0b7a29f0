"""How the time to compile a step grows with its size: an MLP of 12, 24, 48 and 96 layers.

    python benchmarks/compile_time.py [--save]

Each size runs in a process of its own with an empty cache. ``us an operation`` should hardly grow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cpu_vs_torch import heading

LAYERS = (12, 24, 48, 96)
WIDTH = 64


def run(layers: int) -> dict[str, float]:
    """Record and compile a training step of so many layers; seconds by stage."""
    import flame
    from flame import nn, optim

    flame.manual_seed(0)
    blocks = [m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    model = nn.Sequential(*blocks)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)

    def learn(x: flame.Tensor, y: flame.Tensor) -> flame.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    step = flame.compile(learn)
    x, y = flame.randn(32, WIDTH), flame.randn(32, WIDTH)
    start = time.perf_counter()
    step(x, y)
    first = time.perf_counter() - start
    operations = len(step.graph.nodes)
    return {"first": first, "operations": operations, **step.program.stages}


def alone(layers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--alone", str(layers)]
        environment = {**os.environ, "FLAME_CACHE_DIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(run(args.alone)))
        return
    lines = [heading(len(os.sched_getaffinity(0))), ""]
    for count, layers in enumerate(LAYERS):
        found = alone(layers)
        operations, first = found.pop("operations"), found.pop("first")
        if not count:
            columns = ["layers", "operations", "first step s", *found, "us an operation"]
            lines += [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
            print("\n".join(lines))
        cells = [layers, operations, f"{first:.2f}", *(f"{s:.3f}" for s in found.values())]
        cells.append(f"{first / operations * 1e6:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
    if args.save:
        target = Path(__file__).parent / "results" / "compile_time.md"
        target.write_text("\n".join(["# Time to compile a step", "", *lines, ""]))


if __name__ == "__main__":
    main()
