"""How often an attribute of a module or tensor was set: so a compiled step knows when to look."""


class _Changes:
    count = 0
    tensors = 0  # of any tensor, what is not in its memory: requires_grad, hooks, the memory itself


changes = _Changes()
