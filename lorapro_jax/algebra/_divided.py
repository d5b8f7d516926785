"""Work on the matrices of all pairs, divided among the devices of a mesh.

Otherwise every device does all of it: Gram matrices are summed on each of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

_FEW = 8
"""So many devices do all of it each, and send nothing."""


class Division(NamedTuple):
    """How N matrices are divided; static.

    Attributes:
      total: N.
      mesh: The devices; None where each does all.
    """

    total: int
    mesh: AbstractMesh | None

    @classmethod
    def of(cls, stack: jax.Array) -> "Division":
        """That of an array `(_, N, ...)`, by the mesh that it is on while traced."""
        mesh = jax.typeof(stack).sharding.mesh
        kinds = set(mesh.axis_types)
        known = kinds in ({AxisType.Auto}, {AxisType.Explicit})
        many = isinstance(stack, jax.core.Tracer) and mesh.size > _FEW
        return cls(stack.shape[1], mesh if known and many else None)

    def run(
        self,
        function: Callable[..., Any],
        whole: Any,
        parts: Any,
        rest: Any,
        gather: Callable[[Any], Any] | None = None,
    ) -> Any:
        """`function(whole, parts, rest)`, of which each device does a part.

        Args:
          function: Of matrices that do not depend on each other.
          whole: A tree of arrays `(_, N, ...)` that every device has. It takes its part
            by itself: asked for parts, XLA would divide the layers of the factors.
          parts: A tree of such arrays from another `run`.
          rest: A tree of what all matrices have in common.
          gather: Makes arrays of one shape of a result, of which every device then gets
            all, with one all-gather. Without it each keeps its part, and N is rounded
            up; where nothing is divided it is not called.
        """
        if self.mesh is None:
            return function(whole, parts, rest)
        names = self.mesh.axis_names
        share = -(-self.total // self.mesh.size)
        missing = share * self.mesh.size - self.total

        def mine(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)])
            first = share * jax.lax.axis_index(names)
            return jax.lax.dynamic_slice_in_dim(padded, first, share, axis=1)

        def part(whole: Any, parts: Any, rest: Any) -> Any:
            found = function(jax.tree.map(mine, whole), parts, rest)
            if gather is None:
                return found
            leaves, treedef = jax.tree.flatten(gather(found))
            every = jax.lax.all_gather(jnp.stack(leaves), names, axis=2, tiled=True)
            return jax.tree.unflatten(treedef, list(every[:, :, : self.total]))

        divided = P(None, names)
        return jax.shard_map(
            part,
            mesh=self.mesh,
            in_specs=(P(), divided, P()),
            out_specs=divided if gather is None else P(),
            check_vma=False,
        )(*jax.tree.map(jnp.asarray, (whole, parts, rest)))
