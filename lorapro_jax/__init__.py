"""LoRA-Pro for Optax: LoRA steps as close to full fine-tuning as its rank allows.

    tx = optax.chain(lorapro(), optax.adamw(1e-4))  # better gradients for any optimizer
    tx = lorapro_adamw(1e-4)  # AdamW as full fine-tuning would run it

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025,
arXiv 2407.18242.
"""

from importlib.metadata import version as _version

from ._adam import scale_by_lorapro_adam as scale_by_lorapro_adam
from ._adam_state import ScaleByLoRAProAdamState as ScaleByLoRAProAdamState
from ._adamw import lorapro_adamw as lorapro_adamw
from ._allocate import allocate_ranks as allocate_ranks
from ._describe import describe_pairs as describe_pairs
from ._estimate import estimate_gradients as estimate_gradients
from ._initialize import initialize_adapters as initialize_adapters
from ._initialize import initialize_model as initialize_model
from ._inspect import equivalent_gradient as equivalent_gradient
from ._layout import LoRAPair as LoRAPair
from ._pairs import find_pairs as find_pairs
from ._rank_table import RankTable as RankTable
from ._transform import lorapro as lorapro

__version__ = _version("lorapro_jax")
