"""What `flame doctor` is told, and what importing the runtime must not load."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flame.runtime.cpu.info import info

pytestmark = pytest.mark.unit


def test_info_names_the_machine() -> None:
    told = info()
    assert {"cpu", "threads", "compiler", "blas", "kernel cache"} <= told.keys()
    assert int(told["threads"]) >= 1
    assert "LLVM" in told["compiler"]
    assert "OpenBLAS" in told["blas"]
    assert all(told.values())


def test_importing_the_runtime_loads_no_compiler(run_python: Callable[..., object]) -> None:
    run_python(
        "import sys\n"
        "import flame.runtime.cpu.info, flame.runtime.storage\n"
        "assert 'llvmlite' not in sys.modules and 'scipy_openblas32' not in sys.modules\n"
        "import flame.runtime.cpu as cpu\n"
        "cpu.set_num_threads(2); assert cpu.get_num_threads() == 2\n"
        "assert 'llvmlite' not in sys.modules\n"
    )
