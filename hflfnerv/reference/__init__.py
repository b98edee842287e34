"""The definitions: one module per operation, in plain Python or PyTorch, capable of float64.

Every other implementation is tested against these. Nothing here imports another implementation.
"""
