"""LoRA-Pro on arrays: no trees, no names, no Optax.

From below: the axes of one factor, factors and their skinny products, many small
eigendecompositions at once, Gram matrices in their eigenbases, the formula, steps.
"""
