"""Where the factors start: what the base weight and its gradient say.

Each function here returns an `Initializer` for the arrays of one layer, in the manner
of `jax.nn.initializers`. Notation of the paper: W = W0 + s B A with W0: m×n (out×in),
B: m×r and A: r×n; G is the mean gradient of the loss at W0, m×n.
"""

from ._contract import Factors as Factors
from ._contract import Initialized as Initialized
from ._contract import Initializer as Initializer
from ._contract import Matrix as Matrix
from ._contract import cancel as cancel
from ._methods import Direction as Direction
from ._methods import Scaling as Scaling
from ._methods import gora as gora
from ._methods import lora as lora
from ._methods import lora_ga as lora_ga
from ._methods import lora_one as lora_one
from ._methods import olora as olora
from ._methods import pissa as pissa

__all__ = [
    "Direction",
    "Factors",
    "Initialized",
    "Initializer",
    "Matrix",
    "Scaling",
    "cancel",
    "gora",
    "lora",
    "lora_ga",
    "lora_one",
    "olora",
    "pissa",
]
