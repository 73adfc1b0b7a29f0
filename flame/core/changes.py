"""How often an attribute of any module was set: what tells a compiled step to look at its guards."""


class _Changes:
    count = 0


changes = _Changes()
