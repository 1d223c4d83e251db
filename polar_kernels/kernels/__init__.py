"""Triton kernels, one family a file, each with its launcher. They read the checkpoint's own byte stream.

Imported on first use only: importing the package touches neither Triton nor a GPU.
"""
