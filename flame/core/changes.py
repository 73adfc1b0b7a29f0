"""How often an attribute of any module was set: what tells a compiled step to look at its guards."""


class _Changes:
    count = 0
    tensors = 0  # of any tensor, what is not in its memory: requires_grad, hooks, the memory itself


changes = _Changes()
