"""Ops of the table on the emulated GPU: some of each kind; a real one runs them all.

Each case is one sample of each op, so that every op is seen by some kind of check.
"""

from __future__ import annotations

import pytest

from flame.ops.op import OPS

from .dry import get_ready
from .generated import Check, checks_of

pytestmark = pytest.mark.usefixtures("eager_cuda")

PARTS = 8
KINDS = ("values", "gradients", "layouts", "values", "compiled")


def chosen(part: int) -> list[Check]:
    """One check of each eighth op; its kind and its sample take turns."""
    found = []
    for number, op in enumerate(list(OPS.values())[part::PARTS]):
        kind = KINDS[(number + part) % len(KINDS)]
        checks = list(checks_of(op, kind, thorough=False)) or list(
            checks_of(op, "values", thorough=False)
        )
        found.append(checks[number % len(checks)])
    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_ops(part: int) -> None:
    checks = chosen(part)
    get_ready(checks)
    for check in checks:
        try:
            check()
        except Exception as error:
            error.add_note(str(check))
            raise


def test_every_op_is_chosen() -> None:
    assert {check.op.name for part in range(PARTS) for check in chosen(part)} == set(OPS)
