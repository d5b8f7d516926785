"""What tunix, qwix and what they need still use of JAX, Flax and Optax: marks.

Some warnings carry the names of modules of Flax and Optax, not of tunix.
"""

import pytest

TUNIX = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
]
GLOBAL_NORM = pytest.mark.filterwarnings(
    "ignore:optax.global_norm is:DeprecationWarning"
)
STATE = pytest.mark.filterwarnings("ignore:.flax.nnx.State. will be:DeprecationWarning")
LANGUAGE_MODELS = [
    *TUNIX,
    STATE,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:flax.*"),
    # tunix looks for the mesh where this puts it, and `jax.set_mesh` does not.
    pytest.mark.filterwarnings("ignore:.with mesh.. context:DeprecationWarning"),
]
