"""Saving and loading state: `save` and `load`, one safetensors file, never half written."""

from flame.checkpoint.file import load, save

__all__ = ["load", "save"]
