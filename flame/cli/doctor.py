"""``flame doctor``: what this machine has, and what is missing, with the command that brings it."""

import platform
import re
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, requires, version

DISTRIBUTION = "flame-engine"


def examine() -> int:
    """Prints what the machine has, then the packages of each extra; the exit code."""
    from flame.runtime.cpu.info import info
    from flame.runtime.cuda.info import info as cuda_info

    for name, value in info().items():
        _tell(name, value)
    _tell("python", f"{platform.python_version()} on {platform.platform()}")
    for name, value in cuda_info().items():
        _tell(name, value)
    print()
    for extra, names in _requirements().items():
        found = {name: _version(name) for name in names}
        present = ", ".join(f"{name} {number}" for name, number in found.items() if number)
        missing = ", ".join(name for name, number in found.items() if number is None)
        label = f"extra {extra}" if extra else "installed"
        if missing:
            wanted = f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION
            _tell(label, f"missing {missing}: pip install {wanted}")
        else:
            _tell(label, present)
    return 0


def _tell(name: str, value: str) -> None:
    print(f"{name:<24}{value}")


def _requirements() -> dict[str, list[str]]:
    """Extra -> names of its packages, as the installed distribution declares; "" is the base."""
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
