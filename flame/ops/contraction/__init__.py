"""Sums of products over one dimension, C = A @ B, by kernels that hold a tile of C in registers."""

from flame.ops.contraction.factors import Factor
from flame.ops.contraction.fusion import BiasStore, Epilogue, PlainStore, Prologue
from flame.ops.contraction.lowering import contract

__all__ = ["BiasStore", "Epilogue", "Factor", "PlainStore", "Prologue", "contract"]
