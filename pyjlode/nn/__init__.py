"""Modules that people train."""

from ..systems import SecondOrder
from .annealing import kl_annealing
from .cnf import CNF, Flow
from .concat import ConcatLinear, ConcatSquash, TimeMLP
from .flow_transform import FlowTransform
from .latent_ode import Elbo, LatentODE
from .likelihoods import GaussianLikelihood, PoissonProcess
from .mechanics import HamiltonianNN, LagrangianNN
from .neural_cde import NeuralCDE
from .neural_ode import NeuralODE
from .recognition import ODERNN, GRURecognition
from .resnet import ResNetBlock
from .training import Shots, collocate, gradient_matching, multiple_shooting

__all__ = [
    "CNF",
    "ODERNN",
    "ConcatLinear",
    "ConcatSquash",
    "Elbo",
    "Flow",
    "FlowTransform",
    "GRURecognition",
    "GaussianLikelihood",
    "HamiltonianNN",
    "LagrangianNN",
    "LatentODE",
    "NeuralCDE",
    "NeuralODE",
    "PoissonProcess",
    "ResNetBlock",
    "SecondOrder",
    "Shots",
    "TimeMLP",
    "collocate",
    "gradient_matching",
    "kl_annealing",
    "multiple_shooting",
]
