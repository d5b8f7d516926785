"""What a step does to the weight, and whether gradients are of one weight at all."""

from ._equivalent import equivalent_gradient
from ._gradients import check_gradients
from ._metrics import step_metrics

__all__ = ["check_gradients", "equivalent_gradient", "step_metrics"]
