"""Devices: memory, text to machine code, launch."""
