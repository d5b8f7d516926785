"""LoRA-RITE beside the port of its authors' code that PyTorch users have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lora_rite

torch = pytest.importorskip("torch")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

STEPS, RATE, B1, B2 = 50, 0.02, 0.9, 0.99
# The port has ε² under the root as well: of a size that does not show.
EPS, TOLERANCE = 1e-10, 1e-9
SHAPES = [(9, 6, 3), (7, 8, 2)]  # m, n, r


def problem():
    """Factors in the paper's layout, and the target of each product."""
    rng = np.random.default_rng(0)
    shapes = lambda m, n, r: ((r, n), (m, r), (m, n))
    return [[rng.standard_normal(x) for x in shapes(*sizes)] for sizes in SHAPES]


@functools.cache
def in_torch(escape_mass, bound):
    """All products after each step."""
    factors = [[torch.nn.Parameter(torch.tensor(x)) for x in p[:2]] for p in problem()]
    targets = [torch.tensor(target) for _, _, target in problem()]
    optimizer = pytorch_optimizer.LoRARite(
        [x for pair in factors for x in pair], lr=RATE, betas=(B1, B2), eps=EPS,
        apply_escape=escape_mass, clip_unmagnified_grad=bound or 0.0,
        update_skipping=0.0,
    )  # fmt: skip
    result = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        each = zip(factors, targets, strict=True)
        sum(((b @ a - target) ** 2).sum() / 2 for (a, b), target in each).backward()
        optimizer.step()
        products = [(b @ a).detach().numpy().ravel() for a, b in factors]
        result.append(np.concatenate(products))
    return np.stack(result)


def in_jax(escape_mass, bound):
    """The same by `lora_rite`."""
    params = {
        str(k): {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T)}
        for k, (a, b, _) in enumerate(problem())
    }
    weights = lambda params: [(x["lora_a"] @ x["lora_b"]).mT for x in params.values()]
    tx = lora_rite(RATE, B1, B2, EPS, escape_mass=escape_mass, max_grad_norm=bound)

    def loss(params):
        each = zip(weights(params), problem(), strict=True)
        return sum(jnp.sum((w - target) ** 2) / 2 for w, (_, _, target) in each)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.concatenate([w.ravel() for w in weights(params)])

    return jax.jit(lambda x: jax.lax.scan(step, x, length=STEPS)[1])(
        (params, tx.init(params))
    )


@pytest.mark.parametrize("bound", [1.0, None])
@pytest.mark.parametrize("escape_mass", [True, False])
def test_trajectory_is_that_of_the_port(escape_mass, bound):
    """50 steps of two pairs, which one norm clips."""
    received = in_jax(escape_mass, bound)

    expected = in_torch(escape_mass, bound)
    np.testing.assert_allclose(received, expected, atol=TOLERANCE)
    # Negative control: both options matter.
    unclipped = None if bound else 1.0
    for other in ((not escape_mass, bound), (escape_mass, unclipped)):
        assert np.abs(in_torch(*other) - expected).max() > 1e-3
