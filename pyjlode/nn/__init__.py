"""Modules that people train."""

from .neural_ode import NeuralODE

__all__ = ["NeuralODE"]
