"""The table of methods, and the coefficients of those that have a tableau: data, with their sources."""

from .table import ALIASES as ALIASES
from .table import DEFAULT as DEFAULT
from .table import ELSEWHERE as ELSEWHERE
from .table import METHODS as METHODS
from .table import Method as Method
from .table import elsewhere as elsewhere
from .table import find as find
from .table import hairer as hairer
from .table import julia_method as julia_method
from .table import unknown as unknown
