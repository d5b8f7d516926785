"""The recipes of `examples/recipes`: they learn, freeze the base, and know their s.

Each recipe's `main` runs once, with few steps. What it built, trained and told the
library is recorded on the way, by wrapping the names that the recipe imported.
"""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from scipy.special import log_softmax

from examples.recipes import digits
from lorapro_jax import (
    describe_pairs,
    equivalent_gradient,
    find_pairs,
    lorapro,
    lorapro_adamw,
)
from tests.support.layouts import distance, leaves_by_path

FOLDER = Path(digits.__file__).parent
FILES = sorted(FOLDER.glob("[!_]*.py"))
# They have tests of their own.
OTHERS = {"digits", "keras_loop", "resize", "tunix_merge", "tunix_peft"}
RECIPES = sorted({x.stem for x in FILES} - OTHERS)
STEPS = 40
# Two ways to one derivative, each through a few float32 products of up to 128 terms
# and a softmax: 128 roundings, were none to cancel.
RTOL = 128 * float(jnp.finfo(jnp.float32).eps)
# What qwix still calls is deprecated in Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*")


class Run(NamedTuple):
    """One run of a recipe's `main`."""

    recipe: ModuleType
    losses: tuple[float, float]
    printed: str
    told: list[dict[str, Any]]  # options of describe_pairs and of the transform
    apply: Any  # from (params, images) to logits
    before: Any
    after: Any
    folder: Path  # where it ran


def load_recipe(name):
    text = (FOLDER / f"{name}.py").read_text()
    for package in ("qwix", "tensorboardX"):
        if f"import {package}" in text or f"from {package} import" in text:
            pytest.importorskip(package)
    return importlib.import_module(f"examples.recipes.{name}")


def as_pure(model):
    """A function of params and images, and a copy of the params, from any Flax."""
    if isinstance(model, tuple):
        module, params = model
        return lambda params, x: module.apply({"params": params}, x), params
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params


def run_main(name, steps, folder):
    recipe, told, models = load_recipe(name), [], []

    def spy(function):
        def call(*args, **options):
            told.append(options)
            return function(*args, **options)

        return call

    def new_model(new=recipe.new_model):
        model = new()
        models.append(as_pure(model))
        return model

    def fine_tune(*args, tune=recipe.fine_tune):
        tuned = tune(*args)
        linen = len(args) == 3
        models.append((None, tuned) if linen else as_pure(tuned))
        return tuned

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)  # where it may leave files
        for function in (describe_pairs, lorapro, lorapro_adamw):
            if hasattr(recipe, function.__name__):
                patch.setattr(recipe, function.__name__, spy(function))
        patch.setattr(recipe, "new_model", new_model)
        patch.setattr(recipe, "fine_tune", fine_tune)
        losses = recipe.main(steps)
    (apply, before), (_, after), *_ = models  # a comparison may follow
    return Run(recipe, losses, printed.getvalue(), told, apply, before, after, folder)


@pytest.fixture(scope="module", params=RECIPES)
def run(request, tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)  # compiles sooner
    yield run_main(request.param, STEPS, tmp_path_factory.mktemp(request.param))
    jax.config.update("jax_disable_most_optimizations", False)


def is_factor(path):
    return re.search(r"lora_[ab]$", path) is not None


def test_it_lowers_the_loss_on_test_digits_below_that_of_guessing(run):
    """The losses are what it returned, and what its models have in float64."""
    _, test = digits.load()
    chosen = np.arange(len(test.labels)), test.labels
    for params, loss in zip((run.before, run.after), run.losses, strict=True):
        logits = np.asarray(run.apply(params, test.images), np.float64)
        assert -log_softmax(logits, -1)[chosen].mean() == pytest.approx(loss, rel=1e-4)
    before, after = run.losses
    assert after < 0.3 * before
    assert after < np.log(10) < before


def test_only_the_factors_change(run):
    before, after = leaves_by_path(run.before), leaves_by_path(run.after)
    assert before.keys() == after.keys()
    for path, x in before.items():
        same = np.asarray(x).tobytes() == np.asarray(after[path]).tobytes()
        assert same != is_factor(path), path


def test_its_scale_is_the_s_of_the_forward_pass(run, monkeypatch):
    """Moving a pair's factors changes the logits as moving its kernel by E does.

    The kernel is the base weight itself, so nothing but the model says what s is.
    """
    assert len(run.told) >= 2  # describe_pairs, and a transform for each training
    assert all(options == run.told[0] for options in run.told)
    apply, params = run.apply, run.after
    if hasattr(run.recipe, "WEIGHTS"):  # codes have no derivative
        apply, params = without_quantisation(run, monkeypatch)
    leaves = leaves_by_path(params)
    images = digits.load()[1].images[:16]

    @jax.jit
    def change(moved):
        tangents = [moved.get(path, jnp.zeros_like(x)) for path, x in leaves.items()]
        tangent = jax.tree.unflatten(jax.tree.structure(params), tangents)
        return jax.jvp(lambda x: apply(x, images), (params,), (tangent,))[1]

    rng = np.random.default_rng(0)
    zeros = {path: jnp.zeros_like(x) for path, x in leaves.items()}
    pairs = find_pairs(run.before, **run.told[0])
    assert pairs
    for pair in pairs:
        a, b = leaves[pair.a], leaves[pair.b]
        da, db = (jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (a, b))
        kernel = re.sub(r"(/lora)?/(kernel_)?lora_a$", "/kernel", pair.a)
        e = equivalent_gradient(a, b, da, db, pair.scale, pair=pair)
        e = e.reshape(leaves[kernel].shape)  # qwix flattens heads under Linen

        by_factors = change(zeros | {pair.a: da, pair.b: db})
        by_kernel = change(zeros | {kernel: e})
        of_wrong_s = change(zeros | {kernel: 1.01 * e})

        assert distance(by_kernel, by_factors) < RTOL, pair
        # Negative control: one per cent is seen.
        assert distance(of_wrong_s, by_factors) > 100 * RTOL, pair


def without_quantisation(run, monkeypatch):
    """The recipe's model with float kernels of the same values; the same function."""
    import qwix

    monkeypatch.setattr(run.recipe, "WEIGHTS", None)
    apply, params = as_pure(run.recipe.new_model())
    quantised = leaves_by_path(run.after)

    def value(path):
        if path in quantised:
            return quantised[path]
        code, scale = (quantised[f"{path}/array/{x}"] for x in ("qvalue", "scale"))
        return qwix.dequantize(qwix.QArray(code, scale, qtype="nf4"))

    values = [value(path) for path in leaves_by_path(params)]
    params = jax.tree.unflatten(jax.tree.structure(params), values)
    images = digits.load()[1].images[:16]
    assert distance(apply(params, images), run.apply(run.after, images)) < RTOL
    return apply, params


def test_it_prints_the_table_of_all_factors(run):
    table = describe_pairs(run.before, **run.told[0])
    rows = [x for x in table.splitlines() if not x.startswith("other leaves")]
    assert "\n".join(rows) in run.printed
    factors = {x for pair in find_pairs(run.before) for x in pair[:2]}
    assert factors == set(filter(is_factor, leaves_by_path(run.before)))


def test_qlora_has_a_base_of_four_bits():
    recipe = load_recipe("qlora")
    leaves = leaves_by_path(as_pure(recipe.new_model())[1])
    codes = [x for path, x in leaves.items() if path.endswith("kernel/array/qvalue")]
    assert [x.dtype for x in codes] == [jnp.uint4] * 3
    assert not any(path.endswith("/kernel") for path in leaves)  # no float beside them


def test_scanned_layers_are_one_pair_with_an_axis_of_layers():
    recipe = load_recipe("scanned_layers")
    pairs = find_pairs(as_pure(recipe.new_model())[1])
    stacked = {pair.a.split("/")[0]: pair.a_batch_axes for pair in pairs}
    assert stacked == {"blocks": (0,), "head": ()}
    assert len(pairs) == 3


@pytest.mark.parametrize("run", ["gradient_start"], indirect=True)
def test_gradient_start_saves_its_adapters_for_the_original_weights(run):
    """W0 with the file's s B A has the trained model's loss; so have these losses."""
    base = run.recipe.base_model()
    folder, config = run.folder / run.recipe.FOLDER, "adapter_config.json"
    entries = json.loads((folder / config).read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    ranks = {}
    for name, layer in nnx.to_pure_dict(nnx.state(base)).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        alpha = entries["alpha_pattern"].get(f"^{name}", entries["lora_alpha"])
        ranks[name] = len(a)
        change = alpha / len(a) * (b @ a).T
        getattr(base, name).kernel[...] = layer["kernel"] + change
    images = digits.load()[1].images[:16]
    want = run.apply(run.after, images)
    assert distance(base(images), want) < 100 * RTOL
    # Negative control: without the file.
    assert distance(run.recipe.base_model()(images), want) > 0.1

    pairs = find_pairs(run.before)
    assert {pair.a.split("/")[0]: 2 * pair.rank for pair in pairs} == ranks
    assert len(set(ranks.values())) > 1
    lines = re.findall(r"^(before|after) +test loss ([\d.]+)", run.printed, re.M)
    assert [x for x, _ in lines] == ["before", "after"] * 2
    assert lines[1] != lines[3]  # the comparison is another run


@pytest.mark.parametrize("run", ["merge"], indirect=True)
def test_merge_prints_that_both_merged_models_compute_the_same(run):
    """And the plain model does: kernels of the trained one, and no adapters."""
    off = re.findall(r"logits off by (\S+)", run.printed)
    assert len(off) == 2
    assert max(map(float, off)) < RTOL
    images = digits.load()[1].images[:16]
    model = run.recipe.new_model()
    nnx.update(model, run.after)
    plain = run.recipe.plain_model(model)
    assert not find_pairs(nnx.state(plain))
    assert distance(plain(images), run.apply(run.after, images)) < RTOL
    # Negative control: the kernels alone are another model.
    assert distance(plain(images), run.apply(run.before, images)) > 100 * RTOL


def test_resize_grows_and_cuts_the_adapters_while_it_trains(quick_compiles, capsys):
    before, after = load_recipe("resize").main(60)
    assert after < 0.3 * before
    printed = capsys.readouterr().out
    rows = re.findall(r"rank (\d), relative error of the product (\S+)", printed)
    errors = {rank: [float(x) for y, x in rows if y == rank] for rank in "84"}
    assert errors["8"] == [0.0] * 3
    assert all(0 < x < 0.5 for x in errors["4"])
    assert len(errors["4"]) == 3


def test_a_rate_of_zero_learns_nothing(quick_compiles):
    """Negative control: it is the optimizer that lowers the loss."""
    recipe = load_recipe("linen_train_state")
    model, params = recipe.new_model()
    after = recipe.fine_tune(model, params, 3, 0.0)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 100
    if path.stem != "digits":
        assert f"python -m examples.recipes.{path.stem}\n" in text.split('"""')[1]
