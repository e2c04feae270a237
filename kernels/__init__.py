"""Triton kernels, one family a file, each beside the plain PyTorch that it must agree with.

A model imports a file here only if its config names the backend `triton`. The exception is dequant_matmul.py, which
also defines the layout of quantised weights: it is always imported and works without Triton.
Importing this package imports nothing: transformers looks at every package of this name (see tests/test_layout.py).
"""
