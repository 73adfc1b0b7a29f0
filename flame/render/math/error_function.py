"""erf.

Method: an odd polynomial for small arguments, and 1 - exp(P(|x|)) with P close to log(erfc) above.
The polynomials were computed by Remez's exchange, the first for the least relative error, the
second for the least error of its exponential, each coefficient rounded to the dtype before the next
were fitted.
"""

from __future__ import annotations

from typing import Final

from flame.core import dtypes
from flame.kernel.values import Value, binary, compare, fma, select
from flame.render.math._blocks import Table, at_most, long_polynomial, number
from flame.render.math.exponential import decaying_exp

_BORDER: Final = {dtypes.float32: 0.875, dtypes.float64: 1.0}
_LAST: Final = {dtypes.float32: 4.0, dtypes.float64: 6.0}  # erf rounds to 1 before

# erf(x) / x - 1 in x², below the border. Error relative to erf: 2**-26.1, 2**-56.0.
_SMALL: Final[Table] = {
    dtypes.float32: (
        0.12837915, -0.37612534, 0.112823255, -0.026787383, 0.0050265836, -0.00061754376,
    ),
    dtypes.float64: (
        0.12837916709551256, -0.3761263890318346, 0.11283791670942646, -0.026866170642927213,
        0.005223977604886282, -0.0008548325878813634, 0.00012055292244994624,
        -1.4924689244026383e-05, 1.6446871053118994e-06, -1.6204464227227047e-07,
        1.3703491797608649e-08, -7.766280187921276e-10,
    ),
}  # fmt: skip
# log(erfc(x)) above the border. Error of erf: 2**-29.1, 2**-57.1.
_LARGE: Final[Table] = {
    dtypes.float32: (
        -0.00014423305, -1.1278893, -0.63682085, -0.104250036, 0.022380974, -0.0030819941,
        0.00019990325,
    ),
    dtypes.float64: (
        -5.132729696046671e-07, -1.128373991405999, -0.6366440564732156, -0.10270228597872157,
        0.018988034688793027, 0.0004135469406376959, -0.001918956755024048,
        0.0007730523520179106, -0.000136560255226795, -1.9520677336513723e-05,
        2.2531981605841493e-05, -8.578491524576967e-06, 2.114726445679297e-06,
        -3.695512826771256e-07, 4.5931212650342286e-08, -3.889818612483232e-09,
        2.0202264815346862e-10, -4.864779857434962e-12,
    ),
}  # fmt: skip


def erf(x: Value) -> Value:
    """2 / sqrt(pi) times the integral of exp(-t²) from 0 to x, within 1.5 ulp."""
    size = abs(x)
    bounded = at_most(size, _LAST[x.dtype])
    large = number(1, x) - decaying_exp(long_polynomial(bounded, _LARGE[x.dtype]), 1.0)
    small = fma(size, long_polynomial(x * x, _SMALL[x.dtype]), size)
    chosen = select(compare("gt", size, number(_BORDER[x.dtype], x)), large, small)
    return binary("copysign", chosen, x)
