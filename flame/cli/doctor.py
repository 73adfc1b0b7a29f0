"""``flame doctor``: what this machine has, and what is missing, with the command that brings it."""

import platform
import re
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, requires, version

from rich.console import Console
from rich.table import Table

DISTRIBUTION = "flame-engine"


def examine() -> int:
    """Prints a table of the machine and one of the packages; the exit code."""
    from flame.runtime.cpu.info import info

    console = Console(highlight=False)
    machine = Table(title="machine", title_justify="left", show_header=False, box=None)
    for name, value in info().items():
        machine.add_row(name, value)
    machine.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    machine.add_row("cuda", "not available in this build")
    console.print(machine, markup=False)

    packages = Table(title="\npackages", title_justify="left", show_header=False, box=None)
    for extra, names in _requirements().items():
        found = {name: _version(name) for name in names}
        missing = sorted(name for name, number in found.items() if number is None)
        present = ", ".join(f"{name} {number}" for name, number in found.items() if number)
        packages.add_row(extra or "base", present or "-", _advice(extra, missing))
    console.print(packages, markup=False)
    return 0


def _advice(extra: str, missing: list[str]) -> str:
    if not missing:
        return "complete"
    wanted = f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION
    return f"missing: {', '.join(missing)}\nbrought by: pip install {wanted}"


def _requirements() -> dict[str, list[str]]:
    """Extra -> names of its packages, as the installed distribution declares them; "" is the base."""
    groups: dict[str, list[str]] = defaultdict(list)
    try:
        declared = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        declared = []
    groups[""] = [DISTRIBUTION]
    for requirement in declared:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name is not None and name.group() != DISTRIBUTION:
            groups[extra.group(1) if extra else ""].append(name.group())
    return groups


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
