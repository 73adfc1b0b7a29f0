"""The vocabulary that every layer shares: dtypes, tensor types, errors. Imports nothing of FLAME
above it.
"""
