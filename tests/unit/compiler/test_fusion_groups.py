"""The order between groups, against paths that are searched for."""

from __future__ import annotations

import random

import pytest

from flame.compiler.schedule.fusion_groups import Group, Groups
from flame.core import dtypes
from flame.core.types import tensor_type
from flame.graph import Node, Symbol
from flame.ops.op import OPS

pytestmark = pytest.mark.unit


def some_node(number: int) -> Node:
    symbol = Symbol(f"x{number}", tensor_type(dtypes.float32, (2,)))
    return Node(OPS["exp"], (symbol,), (symbol,), {})


def reached(group: Group, needs: dict[Group, set[Group]]) -> set[Group]:
    """All groups that must run before one."""
    found: set[Group] = set()
    waiting = [group]
    while waiting:
        new = needs[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("seed", range(40))
def test_groups_merge_where_no_third_one_stands_between(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice([1, 2, 9, 30])
    groups = Groups(count)
    needs: dict[Group, set[Group]] = {}
    for number in range(count):
        live = groups.live
        before = set(draw.sample(live, min(len(live), draw.randrange(3))))
        group = groups.add(some_node(number), before, number)
        needs[group] = before
        for _ in range(2):
            a, b = draw.choice(groups.live), draw.choice(groups.live)
            if a is b:
                continue
            before = {g: reached(g, needs) for g in groups.live}
            between = any(
                c not in (a, b)
                and ((a in before[c] and c in before[b]) or (b in before[c] and c in before[a]))
                for c in groups.live
            )
            assert groups.may_merge(a, b) is not between
            if between:
                continue
            kept = groups.merge(a, b, sorted([*a.nodes, *b.nodes], key=id))
            gone = b if kept is a else a
            assert groups.current(gone) is kept
            needs[kept] = (needs[kept] | needs.pop(gone)) - {kept, gone}
            for others in needs.values():
                if gone in others:
                    others.discard(gone)
                    others.add(kept)
            needs[kept].discard(kept)
