"""Triton kernels, one family a file, each beside the plain PyTorch that it must agree with.

A model imports a file here only where its config names the backend `triton`, so everything else runs without Triton.
Importing this package imports nothing: transformers looks at every package of this name (see tests/test_layout.py).
"""
