"""Every op of the table on a real GPU. Several processes (pytest -n 8) share the work well."""

from __future__ import annotations

import pytest

from flame.ops.op import OPS
from tests.cuda.dry import get_ready
from tests.cuda.generated import KINDS, checks_of

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OPS))
def test_ops(name: str, kind: str) -> None:
    checks = list(checks_of(OPS[name], kind, thorough=kind in ("values", "layouts")))
    get_ready(checks)
    for check in checks:
        check()
