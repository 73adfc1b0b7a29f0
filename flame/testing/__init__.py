"""Tools that tests are made of: drawing operands, comparing with references, checking gradients."""

from flame.testing.compiled import check_compiled
from flame.testing.gradients import check_gradients, gradcheck
from flame.testing.references import check_reference
from flame.testing.sampling import LAYOUTS, dtypes_of, make_inputs

__all__ = [
    "LAYOUTS",
    "check_compiled",
    "check_gradients",
    "check_reference",
    "dtypes_of",
    "gradcheck",
    "make_inputs",
]
