"""Vendor libraries: cuBLASLt matrix products, cuDNN convolution and attention.

Invariants: `import flame` loads none of them; a plan is made once per problem, device and setting
of determinism and precision, and kept for the life of the process; what a library does not take is
None, and what fails is an error with the library's status.
"""

from __future__ import annotations

import threading

from flame.core.determinism import are_deterministic_algorithms_enabled
from flame.core.precision import get_float32_matmul_precision
from flame.kernel.library import ConvolutionProblem, MatmulProblem, Problem
from flame.runtime.cuda.driver import Prepared

_prepared: dict[tuple[Problem, int, bool, str], Prepared | None] = {}
_lock = threading.RLock()


def prepare(problem: Problem, device: int) -> Prepared | None:
    """A plan for a problem on a device; None where the library does not take it, for reasons that
    `matmul_layout.describe`, `cudnn_graphs` and `cudnn.refusals` name.

    May run while a stream of this thread is captured. Raises DeviceError where packages are
    missing, CublasError and CudnnError where a library fails.
    """
    settings = (are_deterministic_algorithms_enabled(), get_float32_matmul_precision())
    key = (problem, device, *settings)
    with _lock:
        if key not in _prepared:
            _prepared[key] = _prepare(problem, device)
        return _prepared[key]


def _prepare(problem: Problem, device: int) -> Prepared | None:
    if isinstance(problem, MatmulProblem):
        from flame.runtime.cuda.libraries import cublaslt

        return cublaslt.prepare(problem, device)
    if isinstance(problem, ConvolutionProblem):
        from flame.runtime.cuda.libraries import pointwise

        return pointwise.prepare(problem, device)
    from flame.runtime.cuda.libraries import cudnn

    return cudnn.prepare(problem, device)
