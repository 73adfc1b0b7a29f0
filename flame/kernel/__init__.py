"""The loop language: scalar values, structured loops, kernels. Pure data, no device and no text of
any target.
"""
