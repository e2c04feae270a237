"""Triton kernels, one family a file, each beside the plain PyTorch that it must agree with.

A model imports a file here only where its config names the backend `triton`; but dequant_matmul.py, which also has the
layout of quantised weights, is always imported and does without Triton where there is none.
Importing this package imports nothing: transformers looks at every package of this name (see tests/test_layout.py).
"""
