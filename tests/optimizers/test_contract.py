"""What Optax and JAX do to a transform: every claim for every row of one table.

A new optimizer is one line in `support.transforms`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.support.runs import counted
from tests.support.transforms import TRANSFORMS
from tests.support.trees import loss_fn, make_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

# These are also run without jit, operation by operation: a rule that adjusts, and
# each kind of moments.
EAGER = ("lorapro", "lorapro_adamw", "lorapro_adamw, dense")
NAMES = list(TRANSFORMS)

gradient = jax.jit(jax.grad(loss_fn))
make = functools.cache(lambda name: TRANSFORMS[name].make())
update_of = functools.cache(lambda name: jax.jit(make(name).update))
each_transform = pytest.mark.parametrize("name", NAMES)


def inputs():
    """Parameters, and the gradients of `loss_fn`."""
    params = make_params()
    return params, gradient(params)


def steps(name, params, sequence):
    """The updates for each of some gradients, at parameters that stay, under jit."""
    state, result = make(name).init(params), []
    for grads in sequence:
        updates, state = update_of(name)(grads, state, params)
        result.append(updates)
    return result


def first(name):
    """The first update of `inputs`, which `test_updates_equal_the_oracle` has seen."""
    params, grads = inputs()
    return steps(name, params, [grads])[0]


def assert_close(tree, expected):
    """Equal but for float32 rounding, amplified by 1/damping; in units of a leaf."""
    chex.assert_trees_all_equal_structs(tree, expected)
    for got, want in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def is_masked(x):
    return isinstance(x, optax.MaskedNode)


def labels(tree):
    """For `optax.partition`: one leaf is apart."""
    label = lambda path, _: "rest" if path[0].key == "norm" else "lora"
    return jax.tree.map_with_path(label, tree)


@pytest.mark.parametrize(
    ("name", "jitted"), [(x, True) for x in NAMES] + [(x, False) for x in EAGER]
)
def test_updates_equal_the_oracle(name, jitted):
    """Of two gradients one after the other; every leaf."""
    params, grads = inputs()
    sequence = [grads, gradient(params, 0.5)]
    tx = make(name)
    update = update_of(name) if jitted else tx.update

    state, received = tx.init(params), []
    for x in sequence:
        updates, state = update(x, state, params)
        received.append(updates)

    expected = TRANSFORMS[name].oracle(params, sequence)
    for got, want in zip(received, expected, strict=True):
        assert_close(got, want)
    # Negative control: it is not the gradient's direction as it was.
    with pytest.raises(AssertionError):
        assert_close(received[0]["layers"], grads["layers"])


def program(update, *args):
    """What is computed, as text: from the same leaves the same, whatever holds them."""
    return str(jax.make_jaxpr(update)(*args))


@each_transform
def test_unknown_extra_arguments_and_names_of_optax_are_accepted(name):
    """They change nothing."""
    params, grads = inputs()
    tx = make(name)
    extra = lambda grads, state, params: tx.update(
        updates=grads, state=state, params=params, value=0.5, unknown=1
    )
    plain = lambda *args: tx.update(*args)
    args = grads, tx.init(params), params
    assert program(extra, *args) == program(plain, *args)


@each_transform
def test_same_container_types_come_back(name):
    """And change nothing: so the rest of a chain matches."""
    params, grads = inputs()
    tx = make(name)
    wrapped = lambda tree: [(tree, None), optax.MaskedNode(), {}]
    update = lambda *args: tx.update(*args)
    args = wrapped(grads), tx.init(wrapped(params)), wrapped(params)

    updates, _ = jax.eval_shape(update, *args)

    chex.assert_trees_all_equal_structs(updates, wrapped(grads))
    flat = grads, tx.init(params), params
    if name != "lorapro before adamw":  # Optax's own has more tracing than that
        assert program(update, *args) == program(update, *flat)


@each_transform
def test_state_consists_of_arrays_and_keeps_its_shapes(name):
    params, grads = inputs()
    state = make(name).init(params)

    _, after = update_of(name)(grads, state, params)

    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal_structs(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    # Weakly typed arrays would compile the second step anew.
    weak = lambda tree: [x.aval.weak_type for x in jax.tree.leaves(tree)]
    assert not any(weak(state) + weak(after))
    counts = lambda tree: [int(x) for x in jax.tree.leaves(tree) if x.dtype == "int32"]
    assert set(counts(state)) <= {0}
    assert counts(after) == [x + 1 for x in counts(state)]
    assert bool(counts(state)) == (name != "lorapro")


@each_transform
def test_training_lowers_the_loss_and_compiles_once(name):
    row, params = TRANSFORMS[name], make_params()
    rate = 1.0 if row.descends else -0.05
    update, traces = counted(make(name).update)
    before, state = loss_fn(params), make(name).init(params)
    for _ in range(5):
        updates, state = update(gradient(params), state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    assert loss_fn(params) < before
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in NAMES]
    + [(name, "float16") for name in ("lorapro before adamw", "lorapro_adamw")]
    + [("lorapro before adamw", "float32")],
)
def test_shapes_and_dtypes_are_stable_through_cond_and_scan(name, dtype):
    params = make_params(dtype)
    rate = 1.0 if TRANSFORMS[name].descends else -0.05
    tx = optax.chain(make(name), optax.scale(rate))

    @jax.jit
    def run(carry):
        def step(carry, _):
            def work(params, state):
                updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
                chex.assert_trees_all_equal_dtypes(updates, params)
                return optax.apply_updates(params, updates), state

            carry = jax.lax.cond(True, work, lambda *xs: xs, *carry)
            return carry, loss_fn(carry[0])

        return jax.lax.scan(step, carry, length=4)

    before = (params, tx.init(params))

    after, losses = run(before)

    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert losses[-1] < losses[0]


@each_transform
def test_inject_hyperparams_exposes_numbers_and_lets_them_change(name):
    """Without compiling anew."""
    row = TRANSFORMS[name]
    option = "learning_rate" if "learning_rate" in row.options else "scale"
    value = row.options[option]
    tx = optax.inject_hyperparams(row.factory)(**row.options)
    params, grads = inputs()
    update, traces = counted(tx.update)
    state = tx.init(params)

    received, state = update(grads, state, params)
    assert row.options.keys() <= state.hyperparams.keys()
    state.hyperparams[option] = jnp.float32(2 * value)
    changed, _ = update(grads, state, params)

    assert_close(received, first(name))
    assert len(traces) == 1
    chex.assert_trees_all_equal_dtypes(received, params)
    with pytest.raises(AssertionError):  # negative control: the number matters
        assert_close(changed["layers"], received["layers"])


@each_transform
def test_multi_steps_takes_one_step_on_the_mean_gradient(name):
    params, grads = inputs()
    tx = optax.MultiSteps(make(name), every_k_schedule=2)
    state, update = tx.init(params), jax.jit(tx.update)
    half, rest = (jax.tree.map(lambda x, c=c: c * x, grads) for c in (0.5, 1.5))

    nothing, state = update(half, state, params)
    updates, state = update(rest, state, params)

    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))
    assert_close(updates, first(name))


@each_transform
def test_masked_and_partition_hide_the_rest(name):
    params, grads = inputs()
    mask = {"layers": True, "head": False, "norm": False}
    masked = optax.masked(make(name), mask)
    parts = {"lora": make(name), "rest": optax.set_to_zero()}
    transforms = masked, optax.partition(parts, labels)

    @jax.jit
    def update(states):
        each = zip(transforms, states, strict=True)
        return [tx.update(grads, state, params)[0] for tx, state in each]

    from_mask, partitioned = update([tx.init(params) for tx in transforms])

    expected = first(name)
    assert_close(from_mask["layers"], expected["layers"])
    chex.assert_trees_all_equal(from_mask["head"], grads["head"])
    np.testing.assert_array_equal(partitioned["norm"], 0)
    assert_close({**partitioned, "norm": expected["norm"]}, expected)


@each_transform
def test_clipping_by_the_global_norm_may_stand_before(name):
    """A common factor keeps both gradients of a pair of one G."""
    params, grads = inputs()
    clip = optax.clip_by_global_norm(0.5)

    clipped, _ = jax.jit(clip.update)(grads, clip.init(params))
    (updates,) = steps(name, params, [clipped])

    factor = 0.5 / optax.tree.norm(grads)
    assert factor < 0.1
    smaller = jax.tree.map(lambda x: factor * x, grads)
    assert_close(updates, TRANSFORMS[name].oracle(params, [smaller])[0])


@each_transform
@pytest.mark.parametrize("leaf", ["factor", "other"])
def test_apply_if_finite_drops_a_step_and_its_moments(name, leaf):
    params, grads = inputs()
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    state, update = tx.init(params), finite_update_of(name)
    bad = {**grads, "head": {**grads["head"]}}
    if leaf == "factor":
        bad["head"]["lora_a"] = jnp.full((8, 2), jnp.nan)
    else:
        bad["norm"] = grads["norm"] * jnp.nan

    dropped, state = update(bad, state, params)
    updates, state = update(grads, state, params)

    chex.assert_trees_all_equal(dropped, jax.tree.map(jnp.zeros_like, dropped))
    assert_close(updates, first(name))


@functools.cache
def finite_update_of(name):
    return jax.jit(optax.apply_if_finite(make(name), max_consecutive_errors=3).update)


@each_transform
def test_vmap_over_seeds_equals_a_loop(name):
    many = [make_params(seed=seed) for seed in range(3)]
    grads = [gradient(params) for params in many]
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    tx = make(name)

    received, _ = jax.jit(jax.vmap(tx.update))(
        stack(grads), stack([tx.init(params) for params in many]), stack(many)
    )

    expected = [
        steps(name, params, [x])[0] for x, params in zip(grads, many, strict=True)
    ]
    assert_close(received, stack(expected))


@each_transform
def test_parameters_and_state_can_be_donated_from_the_first_step(name):
    """No buffer is donated twice, and all are reused."""
    tx, params = make(name), make_params()

    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    run = params, tx.init(params)
    expected = [jax.tree.map(jnp.copy, run)]
    for _ in range(2):
        params, state = expected[-1]
        updates, state = update_of(name)(gradient(params), state, params)
        expected.append((jax.tree.map(jnp.add, params, updates), state))
    size = sum(x.nbytes for x in jax.tree.leaves(run))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*run).compile()
    for _ in range(2):
        run = compiled(*run)

    chex.assert_trees_all_close(run, expected[-1], rtol=1e-3, atol=1e-5)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == size


@each_transform
def test_map_params_reaches_all_that_is_like_the_parameters(name):
    """It calls `init` with a placeholder that has no leaves; a count is no part."""
    params = make_params()
    tx = optax.chain(make(name), optax.trace(0.9))
    state = tx.init(params)

    shifted = optax.tree.map_params(tx, lambda x: x + 1, state)

    is_count = lambda x: x.dtype == jnp.int32
    expected = jax.tree.map(lambda x: x if is_count(x) else x + 1, state)
    chex.assert_trees_all_equal(shifted, expected)
    chex.assert_trees_all_equal(shifted[1].trace, jax.tree.map(jnp.ones_like, params))


@each_transform
def test_init_works_on_abstract_parameters(name):
    """As under `jax.eval_shape`, and on what that returns."""
    params = make_params()
    expected = make(name).init(params)
    shapes = jax.eval_shape(lambda: params)

    abstract = jax.eval_shape(make(name).init, params)
    concrete = make(name).init(shapes)

    for state in (abstract, concrete):
        chex.assert_trees_all_equal_structs(state, expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(concrete))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # old Orbax
@each_transform
def test_training_goes_on_bit_by_bit_from_an_orbax_checkpoint(name, tmp_path):
    tx, params = make(name), make_params()

    def step(params, state):
        updates, state = update_of(name)(gradient(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    run = step(*step(params, tx.init(params)))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", run)
        checkpointer.wait_until_finished()
        template = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "run", template)

    chex.assert_trees_all_equal(tuple(restored), run)
    chex.assert_trees_all_equal_structs(tuple(restored), run)
    chex.assert_trees_all_equal(step(*restored), step(*run))
    if jax.tree.leaves(run[1]):  # negative control: the state matters
        fresh = step(run[0], tx.init(run[0]))[0]
        assert jnp.abs(fresh["norm"] - step(*run)[0]["norm"]).max() > 1e-6


@each_transform
@pytest.mark.parametrize("jitted", [True, False])
def test_update_without_params_says_what_to_call(name, jitted):
    params, grads = inputs()
    update = update_of(name) if jitted else make(name).update
    with pytest.raises(ValueError, match=r"`tx.update\(grads, state, params\)`"):
        update(grads, make(name).init(params))
