"""Atoms: the loops of a group, into which the dimensions of all its tensors decompose.

Invariant: a dimension is a list of atoms, outermost first, whose sizes multiply to its size; a
dimension of size 1 is the empty list. Where two tensors must agree, `unify` makes their lists equal
by splitting atoms and by declaring atoms to be the same one, or raises Mismatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flame.core.types import Shape


class Mismatch(Exception):
    """Two dimensions do not decompose into the same loops."""


class Atom:
    """A loop, until it is split (``parts``) or found to be another one (``same``)."""

    __slots__ = ("parts", "same", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()
        self.same: Atom | None = None


Atoms = list[Atom]
Dims = list[Atoms]


def fresh(shape: Shape) -> Dims:
    """New atoms for the dimensions of a shape."""
    return [[Atom(size)] if size != 1 else [] for size in shape]


def flat(atoms: Iterable[Atom]) -> Atoms:
    """The loops that atoms stand for now."""
    found: Atoms = []
    waiting = list(atoms)[::-1]
    while waiting:
        atom = waiting.pop()
        while atom.same is not None:
            atom = atom.same
        if atom.parts:
            waiting += atom.parts[::-1]
        else:
            found.append(atom)
    return found


def joined(dims: Sequence[Atoms]) -> Atoms:
    """All atoms of a tensor, outermost dimension first."""
    return flat(atom for dim in dims for atom in dim)


def unify(some: Iterable[Atom], others: Iterable[Atom]) -> None:
    """Make both lists, of which the sizes have one product, stand for the same loops."""
    left, right = flat(some), flat(others)
    while left and right:
        a, b = left.pop(), right.pop()
        if a is b:
            continue
        if a.size == b.size:
            b.same = a
        elif a.size > b.size:
            _split(a, b)
        else:
            _split(b, a)
        left, right = flat([*left, a]), flat([*right, b])
        if left[-1] is not right[-1]:
            raise Mismatch
        left.pop()
        right.pop()
    if left or right:
        raise Mismatch


def _split(atom: Atom, inner: Atom) -> None:
    if atom.size % inner.size:
        raise Mismatch
    atom.parts = (Atom(atom.size // inner.size), inner)
