"""FLAME: tensors, automatic differentiation and compiled kernels for training neural networks."""

from flame.api import attach
from flame.autograd.mode import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    no_grad,
    set_grad_enabled,
)
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
from flame.creation import as_tensor, from_dlpack, from_numpy, tensor
from flame.eager import Eager
from flame.ops.activations import *  # noqa: F403
from flame.ops.arithmetic import *  # noqa: F403 - each module names its exports
from flame.ops.bitwise import *  # noqa: F403
from flame.ops.bivariate import *  # noqa: F403
from flame.ops.comparison import *  # noqa: F403
from flame.ops.contractions import *  # noqa: F403
from flame.ops.conversion import *  # noqa: F403
from flame.ops.convolution import *  # noqa: F403
from flame.ops.creation import *  # noqa: F403
from flame.ops.division import *  # noqa: F403
from flame.ops.indexing import *  # noqa: F403
from flame.ops.joining import *  # noqa: F403
from flame.ops.masking import *  # noqa: F403
from flame.ops.mathematics import *  # noqa: F403
from flame.ops.normalization import *  # noqa: F403
from flame.ops.op import set_interpreter
from flame.ops.powers import *  # noqa: F403
from flame.ops.products import *  # noqa: F403
from flame.ops.rearranging import *  # noqa: F403
from flame.ops.reductions import *  # noqa: F403
from flame.ops.scans import *  # noqa: F403
from flame.ops.shapes import *  # noqa: F403
from flame.ops.slicing import *  # noqa: F403
from flame.ops.softmax import *  # noqa: F403
from flame.ops.subscript import *  # noqa: F403
from flame.tensor import Tensor

attach()
set_interpreter(Eager())
del attach, set_interpreter, Eager
