"""What a traced program consists of."""

import jax


def equations(function, *args):
    """All equations of a function at these arguments.

    Those of a part come as often as it is called.
    """
    fresh = lambda *args: function(*args)  # traces are cached
    return _all_of(jax.make_jaxpr(fresh)(*args).jaxpr)


def products(function, *args):
    """The same, of `dot_general` alone."""
    found = equations(function, *args)
    return [eqn for eqn in found if eqn.primitive.name == "dot_general"]


def _all_of(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for x in jax.tree.leaves([*eqn.params.values()]):
            part = getattr(x, "jaxpr", x)
            if hasattr(part, "eqns"):
                yield from _all_of(part)
