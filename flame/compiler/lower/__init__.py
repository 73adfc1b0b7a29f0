"""A group of nodes -> kernels of the loop language.

`space` finds the loops that all nodes of a group share, `values` the scalar expression of a symbol
at one point of them; `pointwise`, `rows` and `parts` write the three kinds of kernels.
"""
