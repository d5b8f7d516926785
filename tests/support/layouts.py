"""What the tests of real LoRA stacks share: layouts in letters, and what they imply.

A layout has one letter per axis: `r` is the rank, capitals are stacked axes, all
other letters are features. `Pair("q/lora_a", "q/lora_b", "Ldr", "Lrnh")` is a stack
of layers of an adapter from d features to n heads of size h.

Nothing here uses the package's own reading of paths and axes: the adjusted gradients
come from `oracle.adjust`, layer by layer, on flattened float64 matrices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorapro_jax import LoRAPair, find_pairs
from tests.support import oracle

DAMPING = 1e-3
# Roundings of float32, amplified by the inverse of a Gram matrix damped like this.
RTOL = float(jnp.finfo(jnp.float32).eps) / DAMPING


class Pair(NamedTuple):
    """What a stack's documentation says about one pair of factors."""

    a: str
    b: str
    a_axes: str
    b_axes: str
    scale: float = 1.0

    @property
    def stack(self):
        return "".join(x for x in self.a_axes if x.isupper())


def pair_at(owner, a_axes, b_axes, scale=1.0, *, names=("lora_a", "lora_b")):
    """A `Pair` whose factors are the leaves `names` of one owner."""
    return Pair(*(f"{owner}/{name}" for name in names), a_axes, b_axes, scale)


def leaves_by_path(tree):
    """Leaves by their path, written with `/` and without boxes at the end."""
    name = lambda path: (
        jax.tree_util.keystr(path, simple=True, separator="/")
        .replace(".", "/")
        .removesuffix("/value")
        .removesuffix("/array")
    )
    return {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def random_like(tree, seed, size=0.5):
    """Normal entries in place of every leaf, so that no B is 0."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype)
    return jax.tree.map(draw, tree)


def chain_rule_gradients(params, pairs, seed):
    """∇ Σ ⟨G, W(A, B)⟩ for one random G a weight; ones for all other leaves."""
    rng = np.random.default_rng(seed)

    def value(params):
        leaves = leaves_by_path(params)
        total = 0.0
        for pair in pairs:
            product = "".join(_layouts_as_in_paper(pair)).replace("r", "")
            weight = pair.scale * jnp.einsum(
                f"{pair.a_axes},{pair.b_axes}->{product}",
                leaves.pop(pair.a),
                leaves.pop(pair.b),
            )
            total += jnp.sum(rng.standard_normal(weight.shape) * weight)
        return total + sum(jnp.sum(x) for x in leaves.values())

    return jax.grad(value)(params)


def adjusted(params, grads, pairs, *, gauge="sylvester"):
    """LoRA-Pro's gradients by path, from one dense computation a layer."""
    params, grads = leaves_by_path(params), leaves_by_path(grads)
    result = {}
    for pair in pairs:
        stack, a, b = _layouts_as_in_paper(pair)
        a_layers, b_layers = (f"{stack}{x}" for x in (a, b))
        sides = (pair.a, pair.a_axes, a_layers), (pair.b, pair.b_axes, b_layers)
        matrices = [
            _matrices(np.einsum(f"{axes}->{paper}", tree[path]), len(stack), paper)
            for tree in (params, grads)
            for path, axes, paper in sides
        ]
        layers = [
            oracle.adjust(*layer, scale=pair.scale, damping=DAMPING, gauge=gauge)
            for layer in zip(*matrices, strict=True)
        ]
        for (path, axes, paper), steps in zip(
            sides, zip(*layers, strict=True), strict=True
        ):
            sizes = dict(zip(axes, params[path].shape, strict=True))
            stacked = np.stack(steps).reshape([sizes[x] for x in paper])
            result[path] = np.einsum(f"{paper}->{axes}", stacked)
    return result


def assert_adjusted(updates, grads, params, pairs, *, gauge="sylvester"):
    """Factors got LoRA-Pro's gradients, and all other leaves their own."""
    got, plain = leaves_by_path(updates), leaves_by_path(grads)
    assert got.keys() == plain.keys()
    due = adjusted(params, grads, pairs, gauge=gauge)
    for path, want in due.items():
        assert distance(got[path], want) < RTOL, path
        # Negative control: LoRA's own gradient is not mistaken for the adjusted one.
        assert distance(plain[path], want) > 100 * RTOL, path
    for path in got.keys() - due.keys():
        assert distance(got[path], plain[path]) < RTOL, path


def assert_found(tree, expected, /, **options):
    """`find_pairs` reads exactly these pairs, with these axes, ranks and scales."""
    found = find_pairs(tree, **options)
    assert {pair.a: pair for pair in found} == {
        pair.a: _as_lora_pair(pair, leaves_by_path(tree)) for pair in expected
    }


def distance(got, want):
    """The largest difference, in units of the largest entry that is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def _layouts_as_in_paper(pair):
    """Stacked axes, the layout `r×n` of A and `m×r` of B."""
    features = lambda axes: "".join(x for x in axes if x.islower() and x != "r")
    return pair.stack, "r" + features(pair.a_axes), features(pair.b_axes) + "r"


def _matrices(x, stack_ndim, layout):
    """`(layers, r, n)` or `(layers, m, r)`, in float64."""
    layers = int(np.prod(x.shape[:stack_ndim]))
    rank_first = layout[stack_ndim] == "r"
    shape = (x.shape[stack_ndim], -1) if rank_first else (-1, x.shape[-1])
    return np.asarray(x, np.float64).reshape(layers, *shape)


def _as_lora_pair(pair, leaves):
    a_rank, b_rank = pair.a_axes.index("r"), pair.b_axes.index("r")
    a_batch = tuple(pair.a_axes.index(x) for x in pair.stack)
    b_batch = tuple(pair.b_axes.index(x) for x in pair.stack)
    rank = leaves[pair.a].shape[a_rank]
    return LoRAPair(pair.a, pair.b, a_rank, b_rank, a_batch, b_batch, pair.scale, rank)
