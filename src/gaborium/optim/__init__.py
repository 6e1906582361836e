"""Training steps made for Gabor layers."""

from gaborium.optim.natural import NaturalGradient as NaturalGradient

__all__ = ["NaturalGradient"]
