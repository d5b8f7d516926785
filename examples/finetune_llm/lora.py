"""LoRA by qwix on some kernels of a model, with a base that is quantised or not.

In four bits, 64 weights along the inputs share a scale, which is not quantised itself;
in `o_proj` of attention, 64 of each of the heads do, as qwix cuts the last input axis
alone. In eight bits there is one scale an output.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.kernels import Module, chosen, modules_of

TILE = 64  # weights to one scale in four bits, as in QLoRA
QTYPES = ("nf4", "int8")


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What the forward pass multiplies B A by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def check_quantised(name: str | None) -> None:
    """Raises Refused for an unknown kind of quantised base."""
    if name is not None and name not in QTYPES:
        raise Refused(f"--qlora {name} is not among {', '.join(QTYPES)}.")


class Provider(qwix.LoraProvider):
    """Adapters of qwix whose layers give back the dtype that they got, as in PEFT.

    The factors are float32. Left alone, they would make all activations float32.
    """

    def dot_general(self, lhs, rhs, *args, **options):  # noqa: D102
        y = super().dot_general(lhs, rhs, *args, **options)
        return y.astype(_dtype(lhs, rhs))

    def einsum(self, equation, lhs, rhs, *others, **options):  # noqa: D102
        y = super().einsum(equation, lhs, rhs, *others, **options)
        return y.astype(_dtype(lhs, rhs))


def _dtype(lhs: Any, rhs: Any) -> Any:
    """That of a product of arrays; of codes, that of what they are multiplied by."""
    arrays = [x for x in (lhs, rhs) if isinstance(x, jax.Array | np.ndarray)]
    return jnp.result_type(*arrays)


def _rules(
    spec: Any,
    modules: Sequence[Module],
    rank: int,
    scale: float,
    quantise: str | None,
    ranks: Mapping[str, int] | None,
) -> list[Any]:
    """One rule a kind of module, or one a module where ranks differ.

    Kernels without an adapter are quantised, too, as in QLoRA.
    """
    he = nnx.initializers.he_uniform()
    wide = {
        "lora_a_initializer": lambda key, shape, _: he(key, shape, jnp.float32),
        "lora_b_initializer": lambda _, shape, __: jnp.zeros(shape, jnp.float32),
    }
    rules: list[Any] = []
    for module in modules_of(spec):
        how = _quantisation(spec, module, quantise)
        if module not in modules:
            path = rf"layers/\d+/{module.path}"
            rules += [qwix.QuantizationRule(module_path=path, **how)] if how else []
            continue
        due = {rf"layers/\d+/{module.path}": rank}
        if ranks is not None:
            due = {re.escape(x): ranks[x] for x in ranks if x.endswith(module.path)}
        rules += [
            qwix.LoraRule(module_path=path, rank=r, alpha=scale * r, **wide, **how)
            for path, r in due.items()
        ]
    return rules


def _quantisation(spec: Any, module: Module, quantise: str | None) -> dict[str, Any]:
    """The options of a rule: type, and in four bits how many weights share a scale."""
    if quantise is None:
        return {}
    c, how = spec.model_config, {"weight_qtype": quantise}
    size = c.hidden_dim if module.path == "mlp/down_proj" else c.embed_dim
    size = c.head_dim if module.targets == ("o_proj",) else size
    if quantise == "nf4":
        how["tile_size"] = math.gcd(size, TILE)
    return how


def add_lora(
    spec: Any,
    model: Any,
    mesh: Mesh | None,
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    targets: Sequence[str],
    quantise: str | None = None,
    seed: int = 0,
    ranks: Any = None,
) -> Any:
    """A model with adapters: B is 0, A is He's; both are float32.

    Args:
      spec: From `read_spec`.
      model: From `load`, or from `abstract` for a model without values. Quantised, its
        arrays are used up.
      mesh: That of the model.
      rank: Of all adapters, unless there are `ranks`.
      alpha: B A is multiplied by alpha / rank.
      rslora: Multiply by alpha / √rank instead.
      targets: Hugging Face's names of the kernels.
      quantise: `"nf4"` or `"int8"` for all kernels of the layers; None for none.
      seed: Of A.
      ranks: From `allocate_ranks`; the scale is then that of its reference rank.

    Raises:
      Refused: What `chosen` raises, or a rank above a kernel's smaller side.
    """
    check_quantised(quantise)
    modules = chosen(spec, targets)
    reference = rank if ranks is None else ranks.reference
    scale = scale_of(alpha, reference, rslora)
    rules = _rules(spec, modules, rank, scale, quantise, ranks)
    graph, state = nnx.split(model)

    def adapt(state: Any) -> Any:
        ones = jnp.ones((1, 1), jnp.int32)
        inputs = (ones, ones, None, jnp.ones((1, 1, 1), bool))
        with warnings.catch_warnings():  # qwix uses what is deprecated in Flax
            warnings.simplefilter("ignore", DeprecationWarning)
            return qwix.apply_lora_to_model(
                nnx.merge(graph, state), Provider(rules), *inputs, rngs=nnx.Rngs(seed)
            )

    new = nnx.eval_shape(adapt, state)
    graph_of_new, shapes = nnx.split(new)
    where = None if mesh is None else _shardings(shapes, mesh)
    if isinstance(jax.tree.leaves(state)[0], jax.ShapeDtypeStruct):
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        placed = jax.tree.map(place, shapes, where) if mesh else shapes
        return nnx.merge(graph_of_new, placed)
    run = jax.jit(
        lambda state: nnx.state(adapt(state)),
        out_shardings=where,
        donate_argnums=() if quantise is None else 0,
    )
    return nnx.merge(graph_of_new, run(state))


def _shardings(state: Any, mesh: Mesh) -> Any:
    """Where everything is: as annotated, but for axes that are too small to be cut."""

    def fit(x: Any, where: NamedSharding) -> NamedSharding:
        spec = [
            name if name and x.shape[i] % mesh.shape[name] == 0 else None
            for i, name in enumerate(where.spec)
        ]
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(fit, state, nnx.get_named_sharding(state, mesh))
