"""cuBLASLt's handle, descriptors and layouts: what a `Description` becomes in the library.

Invariant: what is made here lives as long as the process, as plans do; so nothing is destroyed, and
no finalizer calls into a library that may be gone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flame.core.dtypes import DType, bfloat16, float16, float32, float64
from flame.core.errors import CublasError, DeviceError
from flame.runtime.cuda.libraries import device as gpu
from flame.runtime.cuda.libraries.matmul_layout import NEEDS_AUX, NEEDS_BIAS, Description, Layout
from flame.runtime.cuda.packages import INSTALL, load_library

WORKSPACE_LIMIT = 64 << 20
CANDIDATES = 8

# cudaDataType of library_types.h.
DATA_TYPES = {float32: 0, float64: 1, float16: 2, bfloat16: 14}
COMPUTE = {
    "highest": "COMPUTE_32F",
    "high": "COMPUTE_32F_FAST_TF32",
    "medium": "COMPUTE_32F_FAST_16BF",
}
EPILOGUES = {
    "none": "DEFAULT",
    "bias": "BIAS",
    "relu_bias": "RELU_BIAS",
    "gelu_bias": "GELU_BIAS",
    "gelu_aux_bias": "GELU_AUX_BIAS",
    "dgelu": "DGELU",
}


class Library:
    """cuBLASLt on one device: its handle, and the calls that take numbers by address."""

    def __init__(self, device: int) -> None:
        load_library("cudart")
        load_library("cublasLt")
        try:
            from nvmath.bindings import cublas, cublasLt
        except ImportError as error:
            raise DeviceError(
                f"matrix products need the package nvmath-python ({error}): {INSTALL}"
            ) from error
        self.lt: Any = cublasLt
        self.compute_types: Any = cublas.ComputeType
        self.device = device
        with gpu.on_device(device):
            self.device_name = gpu.device_name(device)
            self.handle = self.call("create")
        self.version = int(self.call("get_version"))

    def call(self, name: str, *arguments: Any) -> Any:
        """A call of the library. Raises CublasError with the status."""
        try:
            return getattr(self.lt, name)(*arguments)
        except self.lt.cuBLASLtError as error:
            raise self.failure(name, error) from error

    def failure(self, name: str, error: Any) -> CublasError:
        status = self.lt.get_status_name(error.status)
        return CublasError(f"cublasLt {name}: {status}")

    def set(self, kind: str, target: int, attribute: str, value: int) -> None:
        """Set an attribute of a "matmul_desc", "matrix_layout" or "matmul_preference"."""
        enums = {
            "matmul_desc": self.lt.MatmulDescAttribute,
            "matrix_layout": self.lt.MatrixLayoutAttribute,
            "matmul_preference": self.lt.MatmulPreferenceAttribute,
        }
        number = getattr(enums[kind], attribute)
        dtype = getattr(self.lt, f"get_{kind}_attribute_dtype")(number)
        held = np.array([value], dtype)
        self.call(f"{kind}_set_attribute", target, number, held.ctypes.data, held.nbytes)


class Plan:
    """Descriptor and layouts of a description, and the algorithms that solve it."""

    def __init__(self, library: Library, description: Description, limit: int) -> None:
        self.library, self.description = library, description
        double = description.dtype is float64
        compute = "COMPUTE_64F" if double else COMPUTE[description.precision]
        scale = DATA_TYPES[float64 if double else float32]
        compute_type = getattr(library.compute_types, compute)
        self.descriptor: int = library.call("matmul_desc_create", int(compute_type), scale)
        self.alpha = np.ones(1, np.float64 if double else np.float32)
        self.beta = np.full(1, int(description.accumulate), self.alpha.dtype)
        self._describe_operation()
        self.first = self._layout(description.first, description.dtype)
        self.second = self._layout(description.second, description.dtype)
        self.result = self._layout(description.result, description.result_dtype)
        self.candidates = self._search(limit)

    def _describe_operation(self) -> None:
        library, description = self.library, self.description

        def put(attribute: str, value: int) -> None:
            library.set("matmul_desc", self.descriptor, attribute, value)

        put("TRANSA", int(description.transpose_first))
        put("TRANSB", int(description.transpose_second))
        epilogue = description.epilogue
        put("EPILOGUE", int(getattr(library.lt.Epilogue, EPILOGUES[epilogue])))
        if epilogue in NEEDS_BIAS:
            put("BIAS_DATA_TYPE", DATA_TYPES[description.result_dtype])
            # The heuristic asks for some address; calls set their own.
            put("BIAS_POINTER", placeholder(self.alpha))
        if epilogue in NEEDS_AUX:
            put("EPILOGUE_AUX_POINTER", placeholder(self.alpha))
            put("EPILOGUE_AUX_LD", description.result.leading)
            if description.count > 1:
                put("EPILOGUE_AUX_BATCH_STRIDE", description.result.step)

    def _layout(self, layout: Layout, dtype: DType) -> int:
        library = self.library
        made: int = library.call(
            "matrix_layout_create", DATA_TYPES[dtype], layout.rows, layout.columns, layout.leading
        )
        if self.description.count > 1:
            library.set("matrix_layout", made, "BATCH_COUNT", self.description.count)
            library.set("matrix_layout", made, "STRIDED_BATCH_OFFSET", layout.step)
        return made

    def _search(self, limit: int) -> Any:
        """The heuristic's results, best first; none where the library has no algorithm."""
        library, description = self.library, self.description
        preference = library.call("matmul_preference_create")
        try:
            library.set("matmul_preference", preference, "MAX_WORKSPACE_BYTES", limit)
            factor = max(description.alignment, description.dtype.itemsize)
            result = max(description.alignment, description.result_dtype.itemsize)
            for operand, bytes_ in (("A", factor), ("B", factor), ("C", result), ("D", result)):
                attribute = f"MIN_ALIGNMENT_{operand}_BYTES"
                library.set("matmul_preference", preference, attribute, bytes_)
            found: Any = np.zeros(CANDIDATES, library.lt.matmul_heuristic_result_dtype)
            count = np.zeros(1, np.int32)
            try:
                library.lt.matmul_algo_get_heuristic(
                    library.handle,
                    self.descriptor,
                    self.first,
                    self.second,
                    self.result,
                    self.result,
                    preference,
                    CANDIDATES,
                    found.ctypes.data,
                    count.ctypes.data,
                )
            except library.lt.cuBLASLtError as error:
                # An epilogue that does not go with the dtypes is called an invalid value.
                refusals = ["CUBLAS_STATUS_NOT_SUPPORTED"]
                if description.epilogue != "none":
                    refusals.append("CUBLAS_STATUS_INVALID_VALUE")
                if library.lt.get_status_name(error.status) in refusals:
                    return found[:0]
                raise library.failure("matmul_algo_get_heuristic", error) from error
        finally:
            library.call("matmul_preference_destroy", preference)
        usable = found[: int(count[0])]
        return usable[usable["state"] == 0]

    def check(self, packed: bytes) -> Any:
        """An algorithm from the disk as this library's result; None where it is refused."""
        library = self.library
        known: Any = np.zeros(1, library.lt.matmul_heuristic_result_dtype)
        if len(packed) != known.nbytes:
            return None
        known[:] = np.frombuffer(packed, known.dtype)
        checked: Any = np.zeros(1, known.dtype)
        try:
            library.lt.matmul_algo_check(
                library.handle,
                self.descriptor,
                self.first,
                self.second,
                self.result,
                self.result,
                known.ctypes.data,
                checked.ctypes.data,
            )
        except library.lt.cuBLASLtError:
            return None
        if int(checked["state"][0]) or int(checked["workspace_size"][0]) > WORKSPACE_LIMIT:
            return None
        known["workspace_size"] = checked["workspace_size"]
        return known


def placeholder(held: Any) -> int:
    """Some address aligned to 16 bytes that is not 0."""
    return (int(held.ctypes.data) + 15) & ~15
