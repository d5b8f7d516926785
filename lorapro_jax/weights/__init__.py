"""Base weights: which leaf, which axes, the paper's layout, values and gradients."""
