"""Triton kernels, one family a file, each beside the plain PyTorch that it must agree with.

A model imports a file here only if its config names the backend `triton`, or, for dequant_matmul.py, on a GPU.
quantized_weight.py, the layout of quantised weights, works without Triton. register.py makes operators of the rest.
Importing this package imports nothing: transformers looks at every package of this name (see tests/test_layout.py).
"""
