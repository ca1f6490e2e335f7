"""The compiled part of dispatch/ (csrc/dispatch/module.cpp)."""

import numpy as np
from numpy.typing import NDArray

def balance(costs: NDArray[np.float64], groups: int, equal_counts: bool) -> NDArray[np.int32]: ...
