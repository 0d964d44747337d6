from . import _functions
from ._functions import matmul_4bit

__all__ = ["_functions", "matmul_4bit"]
