"""Kernels of the native runtime against PyTorch in float64."""
