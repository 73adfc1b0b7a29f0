"""Mixed precision: fast operations in bfloat16 or float16, delicate ones in float32."""

from flame.amp._grad_scaler import GradScaler
from flame.autograd.autocasting import (
    autocast,
    custom_bwd,
    custom_fwd,
    get_autocast_dtype,
    is_autocast_available,
    is_autocast_enabled,
)

__all__ = [
    "GradScaler",
    "autocast",
    "custom_bwd",
    "custom_fwd",
    "get_autocast_dtype",
    "is_autocast_available",
    "is_autocast_enabled",
]
