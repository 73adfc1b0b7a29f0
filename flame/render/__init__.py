"""Kernel to text of a target. Pure: no device, no compiler and no cache is touched here."""
