"""tunix's own models and its `PeftTrainer`, with adapters of qwix."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from lorapro_jax import lorapro_adamw
from tests.support.deprecations import GLOBAL_NORM, TUNIX
from tests.support.layouts import assert_found, distance, leaves_by_path, pair_at

pytest.importorskip("tunix")
import qwix
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.sft.peft_trainer import (
    PeftTrainer,
    TrainingConfig,
    TrainingInput,
)

from examples.recipes import tunix_peft

pytestmark = [*TUNIX, GLOBAL_NORM]

ALPHA, RANK, RATE = tunix_peft.ALPHA, tunix_peft.RANK, 1e-2
SIZES = {"embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 6}
MLP = {
    "mlp/gate_proj/kernel": ("dr", "rf"),
    "mlp/up_proj/kernel": ("dr", "rf"),
    "mlp/down_proj/kernel": ("fr", "rd"),
}
LLAMA = MLP | {
    "attn/q_proj/w": ("dr", "rnh"),
    "attn/k_proj/w": ("dr", "rkh"),
    "attn/v_proj/w": ("dr", "rkh"),
    "attn/o_proj/w": ("nhr", "rd"),
}
GEMMA_GROUPED = MLP | {
    "attn/q_einsum/w": ("dr", "rnh"),
    "attn/kv_einsum/w": ("dr", "rckh"),  # one A for keys and values
    "attn/attn_vec_einsum/w": ("nhr", "rd"),
}
GEMMA = MLP | {
    "attn/qkv_einsum/w": ("dr", "rcnh"),
    "attn/attn_vec_einsum/w": ("nhr", "rd"),
}


def new_llama(layers):
    options = {"num_layers": layers, "vocab_size": 32, "num_kv_heads": 2}
    config = llama3.ModelConfig(**SIZES, **options, rope_theta=100, norm_eps=1e-5)
    return tunix_peft.add_lora(tunix_peft.new_model(config))


def new_gemma(kv_heads):
    options = {"num_layers": 1, "num_embed": 32, "sliding_window_size": 8}
    config = gemma3.ModelConfig(**SIZES, **options, num_kv_heads=kv_heads)
    model = gemma3.Gemma3(config, rngs=nnx.Rngs(0))
    rule = qwix.LoraProvider(module_path=".*(einsum|_proj)", rank=RANK, alpha=ALPHA)
    inputs = model.get_model_input()
    return qwix.apply_lora_to_model(model, rule, **inputs, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("new_model", "layers", "layout"),
    [
        pytest.param(lambda: new_llama(2), 2, LLAMA, id="llama3"),
        pytest.param(lambda: new_gemma(2), 1, GEMMA_GROUPED, id="gemma3 grouped"),
        pytest.param(lambda: new_gemma(4), 1, GEMMA, id="gemma3"),
    ],
)
def test_pairs_of_tunix_models_have_the_documented_layouts(new_model, layers, layout):
    factors = nnx.state(nnx.eval_shape(new_model), nnx.LoRAParam)
    expected = []
    for layer in range(layers):
        for weight, axes in layout.items():
            owner, name = f"layers/{layer}/{weight}".rsplit("/", 1)
            names = (f"{name}_lora_a", f"{name}_lora_b")
            expected.append(pair_at(owner, *axes, ALPHA / RANK, names=names))
    assert_found(factors, expected, alpha=ALPHA)
    with pytest.raises(AssertionError):  # negative control: the scale is compared
        assert_found(factors, expected)


def text(seed):
    tokens = np.random.default_rng(seed).integers(32, size=(2, 12), dtype=np.int32)
    return TrainingInput(tokens, np.ones_like(tokens, bool))


def trained(optimizer, batches, accumulate=None):
    """Factors and optimizer state before training, and after."""
    model = new_llama(1)
    config = TrainingConfig(
        eval_every_n_steps=100, gradient_accumulation_steps=accumulate
    )
    trainer = PeftTrainer(model, optimizer, config)
    trainer.with_gen_model_input_fn(tunix_peft.model_inputs)

    def look():
        state = nnx.state(trainer.optimizer, nnx.optimizer.OptState)
        trees = nnx.state(model, nnx.LoRAParam), state
        return [jax.tree.map(np.array, leaves_by_path(tree)) for tree in trees]

    before = look()
    trainer.train(batches)
    return before, look()


def test_peft_trainer_takes_lorapro_adamws_steps(quick_compiles):
    tx, first, second = lorapro_adamw(RATE, alpha=ALPHA), text(0), text(1)
    (start, old), (end, new) = trained(tx, [first, second])
    _, (adamws_end, _) = trained(optax.adamw(RATE), [first, second])
    # Control: the same two steps again, each from two halves of its gradient.
    halves = [first, first, second, second]
    _, (accumulated, _) = trained(tx, halves, accumulate=2)
    for path, factor in start.items():
        step = end[path] - factor
        assert distance(adamws_end[path] - factor, step) > 0.1, path
        assert distance(accumulated[path] - factor, step) < 1e-4, path

    assert old.keys() == new.keys()
    unmoved = {path for path in old if np.array_equal(old[path], new[path])}
    # The state has the factors before the last step. The first moves no A: B was 0.
    prefix = "opt_state/0/pairs/factors/"
    assert unmoved == {prefix + path for path in start if path.endswith("lora_a")}


def test_recipe_lowers_the_test_loss():
    before, after = tunix_peft.main(steps=30)
    assert after < 0.95 * before
