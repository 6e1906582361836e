"""Gabor functions: the parameter records, and their kernels, derivatives and spectra."""
