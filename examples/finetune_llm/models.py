"""Models of a Hugging Face folder in tunix: read, load, place, call.

A folder says all that a model needs. Its weights are read file by file and put on the
mesh as tunix's annotations say, on the axes "fsdp" and "tp".
"""

import contextlib
import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

with warnings.catch_warnings():  # Qwen imports what is deprecated in JAX
    warnings.simplefilter("ignore", DeprecationWarning)
    from tunix.models import safetensors_loader
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.gemma3 import params_safetensors as gemma3_params
    from tunix.models.llama3 import params as llama3_params
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as qwen2_params
    from tunix.models.qwen3 import params as qwen3_params

    from examples.finetune_llm.configs import family_of, for_text, model_config
    from examples.finetune_llm.rotary import Llama, Qwen3

from examples.finetune_llm import names
from examples.finetune_llm.errors import Refused

CLASSES = {
    "llama": Llama,
    "qwen2": qwen2.Qwen2,
    "qwen3": Qwen3,
    "gemma3": gemma3.Gemma3,
}
_PARAMS = {"llama": llama3_params, "qwen2": qwen2_params, "qwen3": qwen3_params}


class Spec(NamedTuple):
    """A folder's model, as its config.json alone says.

    Attributes:
      family: One of the keys of `CLASSES`.
      folder: The folder.
      config: What config.json has; where it has images, too, what it has for text.
      model_config: tunix's configuration.
    """

    family: str
    folder: Path
    config: dict[str, Any]
    model_config: Any


def read_spec(folder: Path, *, remat: bool = False) -> Spec:
    """Reads config.json; nothing is loaded.

    Args:
      folder: A folder as Hugging Face lays it out.
      remat: Whether the backward pass computes each layer again, which takes a third
        more time and far less memory.

    Raises:
      Refused: No folder, no config.json, another architecture, or a feature that
        tunix's model lacks.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise Refused(f"{path} does not exist; a model's folder has one.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{path} is no JSON: {error}") from None
    family, config = family_of(config), for_text(config)
    return Spec(family, Path(folder), config, model_config(family, config, remat))


def _with_dtype(spec: Spec, dtype: Any) -> Any:
    """The configuration in tunix for weights and activations of a dtype."""
    fields = {x.name for x in dataclasses.fields(spec.model_config)}
    new = {x: jnp.dtype(dtype) for x in ("dtype", "param_dtype") if x in fields}
    return dataclasses.replace(spec.model_config, **new)


def load(spec: Spec, mesh: Mesh | None, dtype: Any) -> Any:
    """The model with the weights of its folder.

    Args:
      spec: From `read_spec`.
      mesh: With the axes "fsdp" and "tp"; None for the first device.
      dtype: Of weights and activations.

    Raises:
      Refused: Weights are missing or have other shapes than config.json says, or the
        mesh does not divide them; all of it before anything is loaded.
    """
    names.check_files(spec)
    if mesh is not None:
        abstract(spec, mesh, dtype)  # refuses what the mesh does not divide
    folder, config = str(spec.folder), _with_dtype(spec, dtype)
    options = {"mesh": mesh, "dtype": jnp.dtype(dtype), "mode": "optimized"}
    if spec.family == "gemma3":
        return gemma3_params.create_model_from_safe_tensors(folder, config, **options)
    # What tunix's own functions do, which have no place for another class.
    mapping = _PARAMS[spec.family]._get_key_and_transform_mapping
    return safetensors_loader.load_and_create_model(
        folder, CLASSES[spec.family], config, mapping, **options
    )


def abstract(spec: Spec, mesh: Mesh | None, dtype: Any) -> Any:
    """The model as `load` returns it, with `ShapeDtypeStruct`s in place of weights.

    Raises:
      Refused: The mesh does not divide a weight.
    """
    dtype = jnp.dtype(dtype)
    scope = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with scope:
        new = lambda: CLASSES[spec.family](_with_dtype(spec, dtype), rngs=nnx.Rngs(0))
        model = nnx.eval_shape(new)
    state = nnx.state(model)
    if mesh is None:
        place = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
        nnx.update(model, jax.tree.map(place, state))
        return model
    where = nnx.get_named_sharding(state, mesh)
    for path, x in nnx.to_flat_state(where):
        _check_divides(path, x.get_value(), dict(nnx.to_flat_state(state))[path])
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s)
    nnx.update(model, jax.tree.map(place, state, where))
    return model


def _check_divides(path: tuple, where: NamedSharding, x: Any) -> None:
    """Raises Refused for a weight that cannot be cut as annotated."""
    for axis, name in enumerate(where.spec):
        size = where.mesh.shape[name] if name else 1
        if x.shape[axis] % size:
            option = {"tp": "tensor"}.get(name, name)
            raise Refused(
                f"the mesh's {option}={size} does not divide axis {axis} of "
                f"{'.'.join(map(str, path))}, {tuple(x.shape)}. Take a smaller one."
            )


def random(spec: Spec, seed: int, dtype: Any, mesh: Mesh | None = None) -> Any:
    """The model with new weights, to be pretrained.

    Kernels and embeddings are normal with the `initializer_range` of config.json, as
    in transformers; tunix leaves those of the MLPs 0, where nothing can be learnt.
    """
    model, size = (
        abstract(spec, mesh, dtype),
        spec.config.get("initializer_range", 0.02),
    )
    flat = []
    for i, (path, x) in enumerate(nnx.to_flat_state(nnx.state(model))):
        key, one = jax.random.fold_in(jax.random.key(seed), i), path[-1] == "w"
        x = x.get_value()
        if x.ndim > 1:
            new = _normal(key, size, x.shape, x.dtype, x.sharding)
        else:  # norms, of which Gemma's add 1, and biases
            new = jnp.full(x.shape, float(one), x.dtype, device=x.sharding)
        flat.append((path, new))
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal(key: Any, size: float, shape: Any, dtype: Any, sharding: Any) -> jax.Array:
    drawn = (size * jax.random.normal(key, shape)).astype(dtype)
    if sharding is None:
        return drawn
    return jax.lax.with_sharding_constraint(drawn, sharding)


def apply(
    spec: Spec, model: Any, tokens: jax.Array, positions: jax.Array, mask: jax.Array
) -> jax.Array:
    """The logits of a batch, float32 `(b, t, words)`.

    Args:
      spec: From `read_spec`.
      model: The model, with adapters or without.
      tokens: int32 `(b, t)`.
      positions: int32 `(b, t)`, from 0 in each document.
      mask: bool `(b, t, t)`: which tokens (last axis) each token sees. Where Gemma's
        layers see only near ones, they take more away.

    Within `with mesh:`, tunix says on GPUs and TPUs how activations are divided.
    """
    if spec.model_config.remat_config.name != "NONE":
        # `nnx.remat` writes to the Variables, which then have to be of this trace.
        model = nnx.merge(*nnx.split(model), copy=True)
    logits, _ = model(tokens, positions, None, mask)
    return logits.astype(jnp.float32)
