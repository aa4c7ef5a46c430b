"""Triton kernels, each file with the maths it computes; importing one imports Triton."""
