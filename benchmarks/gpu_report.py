"""What a record of a GPU benchmark says of where and when it was made."""

from __future__ import annotations

import datetime
import platform
import subprocess
from argparse import ArgumentParser
from pathlib import Path

NAMES = {"torch": "PyTorch", "flame": "FLAME"}


def heading(versions: dict[str, str], device: str) -> str:
    """Device, driver, versions by library, date and commit, in one line."""
    parts = [platform.processor() or platform.machine()]
    if device != "cpu":
        told = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        name, _, driver = (told.splitlines() or ["unknown GPU, unknown"])[0].partition(", ")
        parts = [name, f"driver {driver}"]
    parts += [f"{NAMES[library]} {version}" for library, version in sorted(versions.items())]
    parts.append(f"Python {platform.python_version()}")
    commit = output("git", "rev-parse", "--short", "HEAD")
    parts += [datetime.date.today().isoformat(), f"commit {commit or 'unknown'}"]
    return "; ".join(parts)


def add_save(parser: ArgumentParser) -> None:
    """The option ``--save [FOLDER]``."""
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=Path(__file__).parent / "results",
        metavar="FOLDER",
        help="keep the table, in benchmarks/results if no folder is given",
    )


def output(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
