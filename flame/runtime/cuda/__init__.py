"""NVIDIA GPUs: devices, memory, text to machine code, launch, graphs.

Everything loads at the first use of a CUDA device: `import flame` touches none of it.
"""
