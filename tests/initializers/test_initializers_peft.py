"""The initializers against those of Hugging Face PEFT, on the same layer."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import initializers

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

LoraGAConfig = getattr(peft, "LoraGAConfig", None)  # not in every PEFT
SHAPES = [(12, 10), (8, 15), (10, 10)]
RANK, ALPHA = 3, 6.0  # PEFT's SVD is exact where 4 r is at least min(m, n)
TOLERANCE = 1e-4  # 20 roundings of float32, and gaps in the spectra of 1/50
KEY = jax.random.key(0)


def linear(m, n):
    """One linear layer with random weights, m outputs and n inputs."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(n, m, bias=False)
    torch.nn.init.normal_(layer.weight)
    return torch.nn.Sequential(collections.OrderedDict(linear=layer))


def adapted(model, rslora=False, **options):
    """PEFT's A, B and W0 after its initialisation of `model`, and its s."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=rslora,
        target_modules=["linear"], **options,
    )  # fmt: skip
    layer = peft.get_peft_model(model, config).base_model.model.linear
    arrays = layer.lora_A["default"], layer.lora_B["default"], layer.base_layer
    a, b, w = (x.weight.detach().numpy().astype(np.float64) for x in arrays)
    return a, b, w, layer.scaling["default"]


def started(method, w, g, scale):
    """This package's A, B and W0."""
    a, b, change = jax.jit(method, static_argnums=2)(w, g, RANK, scale, KEY)
    return [np.asarray(x, np.float64) for x in (a, b, w + change)]


def weight_of(model):
    return model.linear.weight.detach().numpy().copy()


def assert_close(got, want, atol=TOLERANCE):
    np.testing.assert_allclose(got, want, atol=atol * np.abs(want).max(), rtol=0)


def assert_same_up_to_signs(a, b, other_a, other_b):
    """a_i and b_i may change their sign together, or alone with `change`."""
    assert_close(np.abs(a), np.abs(other_a))
    assert_close(np.abs(b), np.abs(other_b))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_methods_of_the_weight_agree_with_peft(name, shape, rslora):
    model = linear(*shape)
    w = weight_of(model)
    a, b, residual, scale = adapted(model, rslora, init_lora_weights=name)

    got_a, got_b, got_residual = started(getattr(initializers, name)(), w, None, scale)

    assert_same_up_to_signs(got_a, got_b, a, b)
    assert_close(scale * got_b @ got_a, scale * b @ a)
    assert_close(got_residual, residual)
    # Negative control: the other scale, or the other method, is not the same.
    other = {"pissa": initializers.olora, "olora": initializers.pissa}[name]
    assert np.abs(started(other(), w, None, scale)[2] - residual).max() > 1e-2


def test_default_has_the_bounds_of_peft():
    """U(−1/√n, 1/√n) and 0: the largest of 800 is within 1 % of the bound."""
    model = linear(5, 400)
    w = weight_of(model)
    a, b, residual, scale = adapted(model, init_lora_weights=True)
    got_a, got_b, got_residual = started(initializers.lora(), w, None, scale)
    for x in (a, got_a):
        assert np.abs(x).max() == pytest.approx(0.05, rel=0.01)
        assert np.abs(x).max() <= 0.05
        assert x.std() == pytest.approx(0.05 / 3**0.5, rel=0.1)
    np.testing.assert_array_equal(got_b, b)
    np.testing.assert_array_equal(got_residual, residual)


def with_gradient(shape, **options):
    """PEFT's `lora_ga` on a layer, with W0 and G from before."""
    model = linear(*shape)
    w = weight_of(model)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["linear"],
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options),
    )  # fmt: skip
    inputs, targets = torch.randn(64, shape[1]), torch.randn(64, shape[0])
    inputs.requires_grad_()  # PEFT's hook warns without

    def train_step():
        torch.mean((model(inputs) - targets) ** 2).backward()

    peft.preprocess_loraga(model, config, train_step)
    g = model.linear._peft_loraga_grad.numpy().copy()
    x, y = inputs.detach().numpy(), targets.numpy()
    assert_close(jax.grad(lambda w: jnp.mean((x @ w.T - y) ** 2))(w), g)
    layer = adapted(
        model, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options)
    )
    return layer, w, g


@pytest.mark.skipif(LoraGAConfig is None, reason="this PEFT has no LoRA-GA")
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", ["stable", "gd"])
def test_lora_ga_has_the_directions_of_peft_at_other_sizes(shape, direction, scaling):
    """PEFT's B has the singular values in it, and its "stable" spares A."""
    (a, b, residual, scale), w, g = with_gradient(
        shape,
        direction=direction,
        scale={"stable": "stable", "gd": "gd_scale"}[scaling],
    )
    sigma = np.linalg.svd(g, compute_uv=False)[: 2 * RANK]
    of_b = {"ArB2r": sigma[RANK:], "A2rBr": sigma[:RANK], "ArBr": sigma[::2]}

    got_a, got_b, got_residual = started(
        initializers.lora_ga(direction, scaling), w, g, scale
    )

    size = shape[0] ** 0.25 / 4
    spared = {"stable": size, "gd": 1.0}[scaling]
    assert_same_up_to_signs(got_a / spared, got_b * of_b[direction], a, b)
    # Both leave the layer as it was.
    assert_close(residual + scale * b @ a, w)
    assert_close(got_residual + scale * got_b @ got_a, w)
    # Negative controls: neither size is PEFT's, and nor are other directions.
    assert np.abs(np.abs(got_b) - np.abs(b)).max() > 1e-2 * np.abs(b).max()
    other = {"ArB2r": "A2rBr", "A2rBr": "ArB2r", "ArBr": "ArB2r"}[direction]
    other_a, _, _ = started(initializers.lora_ga(other, scaling), w, g, scale)
    assert np.abs(np.abs(other_a / spared) - np.abs(a)).max() > 1e-2
