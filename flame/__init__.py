"""FLAME: tensors, automatic differentiation and compiled kernels for training neural networks."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from flame import linalg, special
from flame.api import attach
from flame.autograd.autocasting import autocast, get_autocast_dtype, is_autocast_enabled
from flame.autograd.mode import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    no_grad,
    set_grad_enabled,
)
from flame.core.determinism import (
    are_deterministic_algorithms_enabled,
    use_deterministic_algorithms,
)
from flame.core.device import Device as device
from flame.core.dtypes import (
    DType,
    bfloat16,
    float16,
    float32,
    float64,
    get_default_dtype,
    int8,
    int16,
    int32,
    int64,
    set_default_dtype,
    uint8,
)
from flame.core.dtypes import bool_ as bool
from flame.core.dtypes import float16 as half
from flame.core.dtypes import float32 as float
from flame.core.dtypes import float64 as double
from flame.core.dtypes import int16 as short
from flame.core.dtypes import int32 as int
from flame.core.dtypes import int64 as long
from flame.core.precision import get_float32_matmul_precision
from flame.creation import (
    as_tensor,
    asarray,
    from_dlpack,
    from_numpy,
    frombuffer,
    scalar_tensor,
    tensor,
)
from flame.eager import Eager, set_float32_matmul_precision
from flame.ops.activations import *
from flame.ops.arithmetic import *
from flame.ops.attention import *
from flame.ops.bitwise import *
from flame.ops.bivariate import *
from flame.ops.combining import *
from flame.ops.comparison import *
from flame.ops.composites import *
from flame.ops.contractions import *
from flame.ops.conversion import *
from flame.ops.convolution import *
from flame.ops.copies import *
from flame.ops.creation import *
from flame.ops.dimensions import *
from flame.ops.division import *
from flame.ops.dropouts import *
from flame.ops.embedding_losses import *
from flame.ops.extrema import *
from flame.ops.gamma import *
from flame.ops.indexing import *
from flame.ops.inspection import *
from flame.ops.interpolation import *
from flame.ops.joining import *
from flame.ops.losses import *
from flame.ops.masking import *
from flame.ops.mathematics import *
from flame.ops.normalization import *
from flame.ops.norms import *
from flame.ops.op import set_interpreter
from flame.ops.padding import *
from flame.ops.pooling import *
from flame.ops.powers import *
from flame.ops.products import *
from flame.ops.random import *
from flame.ops.rearranging import *
from flame.ops.reductions import *
from flame.ops.retyping import *
from flame.ops.scans import *
from flame.ops.scattering import *
from flame.ops.shapes import *
from flame.ops.slicing import *
from flame.ops.softmax import *
from flame.ops.sorting import *
from flame.ops.statistics import *
from flame.ops.subscript import *
from flame.ops.trigonometry import *
from flame.runtime.cpu import get_num_threads, set_num_threads
from flame.tensor import Tensor

__version__ = "0.1.0"

attach(globals())
set_interpreter(Eager())
del attach, set_interpreter, Eager

if _TYPE_CHECKING:
    from flame.recording import compile

_LATE = {"compile": "flame.recording"}
_PACKAGES = ("amp", "autograd", "checkpoint", "cuda", "data", "nn", "optim", "testing")


def __getattr__(name: str) -> object:
    """``flame.nn`` and its like are imported at their first use, as they take time."""
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(_LATE[name]), name)
    if name in _PACKAGES:
        import importlib

        return importlib.import_module(f"flame.{name}")
    raise AttributeError(f"module 'flame' has no attribute {name!r}")
