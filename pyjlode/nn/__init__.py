"""Modules that people train."""

from .cnf import CNF, Flow
from .concat import ConcatLinear, ConcatSquash, TimeMLP
from .flow_transform import FlowTransform
from .neural_ode import NeuralODE
from .resnet import ResNetBlock

__all__ = ["CNF", "ConcatLinear", "ConcatSquash", "Flow", "FlowTransform", "NeuralODE", "ResNetBlock", "TimeMLP"]
