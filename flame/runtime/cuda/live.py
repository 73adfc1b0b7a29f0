"""Which tensors hold a device's memory. Looked up among all objects of the process, when somebody
asks: an allocation pays nothing for it.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from typing import Any, Final

from flame.core.handle import Handle
from flame.runtime.cpu.allocator import readable
from flame.runtime.storage import Storage

SHOWN: Final = 10


def live_groups(device: int) -> list[tuple[str, int, int]]:
    """(description, number of storages, bytes in all), largest first."""
    name = f"cuda:{device}"
    storages: dict[int, Storage] = {}
    widest: dict[int, Any] = {}  # storage -> the type of the largest tensor in it
    for thing in gc.get_objects():
        # No isinstance: it would wake proxies of others among all those objects.
        kind = type(thing)
        if issubclass(kind, Storage):
            if thing.device == name and thing.owner is None:
                storages[id(thing)] = thing
        elif issubclass(kind, Handle):
            held = getattr(thing, "storage", None)
            if held is not None and held.device == name:
                known = widest.get(id(held))
                if known is None or known.numel < thing.type.numel:
                    widest[id(held)] = thing.type
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for key, storage in storages.items():
        type_ = widest.get(key)
        if type_ is None:
            text = f"{readable(storage.nbytes)} without a tensor (a program, kept for backward)"
        else:
            text = f"{type_.dtype.name} {tuple(type_.shape)}"
        groups[text].append(storage.nbytes)
    found = [(text, len(sizes), sum(sizes)) for text, sizes in groups.items()]
    return sorted(found, key=lambda group: -group[2])


def live_report(device: int) -> str:
    """The largest of `live_groups`, a line each, after a heading; empty where there are none."""
    groups = live_groups(device)
    if not groups:
        return ""
    lines = [f"\n  {count:5} x {text}: {readable(size)}" for text, count, size in groups[:SHOWN]]
    rest = sum(size for _, _, size in groups[SHOWN:])
    if rest:
        lines.append(f"\n  and others: {readable(rest)}")
    return "\nThe largest:" + "".join(lines)
