"""The methods, one function each; the notation is that of the room's docstring."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from .._checks import check_choice, check_number
from ..algebra._linalg import matmul, power_of_two, reciprocal
from ..algebra._svd import truncated_svd
from ._contract import Factors, Initializer, Matrix

Direction: TypeAlias = Literal["ArB2r", "A2rBr", "ArBr"]
Scaling: TypeAlias = Literal["stable", "gd"]


def lora() -> Initializer:
    """LoRA's own start, the default of its code and of PEFT.

    A is uniform in ±1/√n, which PyTorch calls Kaiming uniform with a = √5, and B = 0.
    (The paper says Gaussian.) Needs the shape only, and W0 stays. Any rank.

    References:
      Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
      <https://arxiv.org/abs/2106.09685>`_, 2022.
    """

    def factors(
        w: Matrix, g: Matrix, rank: int, scale: jax.Array, key: jax.Array
    ) -> Factors:
        return _uniform(w, rank, key), jnp.zeros((w.shape[0], rank), w.dtype)

    return Initializer("lora", factors)


def lora_ga(
    direction: Direction = "ArB2r", scaling: Scaling = "stable", gamma: float = 16.0
) -> Initializer:
    """LoRA-GA: the first 2r singular directions of the gradient, r for each factor.

    With G = U S Vᵀ, A = c V_Iᵀ and B = c U_J (Theorem 3.1). W0 becomes W0 − s B A, so
    the layer does not change, whatever G is. The rows of A and the columns of B are
    where LoRA's first gradient step is the best approximation of G of rank 2r, up to a
    factor; the first step of LoRA-Pro is exactly that, for every c. Needs G, and
    2r ≤ min(m, n).

    PEFT's `lora_ga` differs: it also multiplies B by the singular values S_J, and its
    "stable" scales B alone.

    Args:
      direction: The singular vectors of the factors: `"ArB2r"`, the first r for A and
        the second r for B; `"A2rBr"`, the reverse; `"ArBr"`, in turns, B first.
      scaling: `"stable"`, c = m^¼/√γ, so that the size of the layer's output does not
        depend on m (section 3.3; made for s = alpha/√r), or `"gd"`, c = 1/s, so that
        LoRA's first gradient step is that of full fine-tuning (Theorem 3.1, ζ = 1).
      gamma: γ of `"stable"`, as in the authors' code; the paper's is its square root.

    References:
      Wang et al., `LoRA-GA: Low-Rank Adaptation with Gradient Approximation
      <https://arxiv.org/abs/2407.05000>`_, 2024.
    """
    check_choice("direction", direction, Direction)
    check_choice("scaling", scaling, Scaling)
    _check_gamma(gamma)

    def factors(
        w: Matrix, g: jax.Array, rank: int, scale: jax.Array, key: jax.Array
    ) -> Factors:
        _check_rank("lora_ga", rank, min(g.shape) // 2, g.shape)
        u, _, vt = truncated_svd(g, 2 * rank, key)
        first, second = slice(0, rank), slice(rank, 2 * rank)
        rows, columns = {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (slice(1, None, 2), slice(0, None, 2)),
        }[direction]
        stable = jnp.asarray(g.shape[0] ** 0.25 / math.sqrt(gamma), g.dtype)
        size = stable if scaling == "stable" else _held(1 / scale, scale)
        return size * vt[rows], size * u[:, columns]

    return Initializer("lora_ga", factors, needs_gradient=True, changes_weight=True)


def gora(gamma: float = 0.05) -> Initializer:
    """GoRA: the gradient, compressed by a random A.

    A is `lora`'s, and B = −(γ/s) √(n/r) G A⁺ (equations 9 and 10). So s B A is the
    best fit of −γ √(n/r) G in the row space of A, and for a random A as large as γ G:
    about one step of gradient descent at the learning rate γ. W0 stays and the layer
    moves; at G = 0 this is `lora`. Needs G, and r ≤ n.

    References:
      He et al., `GoRA: Gradient-driven Adaptive Low Rank Adaptation
      <https://arxiv.org/abs/2502.12171>`_, 2025.
    """
    _check_gamma(gamma)

    def factors(
        w: Matrix, g: jax.Array, rank: int, scale: jax.Array, key: jax.Array
    ) -> Factors:
        _check_rank("gora", rank, g.shape[1], g.shape)
        a = _uniform(g, rank, key)
        q, r = jnp.linalg.qr(a.T)  # A⁺ = Q R⁻ᵀ
        fit = jax.scipy.linalg.solve_triangular(r, matmul(g, q).T).T
        return a, _held(-gamma * math.sqrt(g.shape[1] / rank) / scale * fit, fit)

    return Initializer("gora", factors, needs_gradient=True)


def lora_one(gamma: float = 128.0) -> Initializer:
    """LoRA-One: the first r singular directions of −G, for a step downhill.

    With −G = U S Vᵀ, B A is (U S Vᵀ)_r / (γ S_1), divided evenly between the factors:
    A = √(S_r/(γ S_1)) V_rᵀ and B = U_r √(S_r/(γ S_1)) (Algorithm 1 and the authors'
    code, whose γ is 16 to 128). W0 stays and the layer moves against the gradient, by
    |s|/γ: where s < 0, B changes its sign. A direction that G lacks gets a column of B
    that is 0 and a row of A as long as the first, from where it can train; so does all
    of B at G = 0. Needs G, and r ≤ min(m, n).

    References:
      Zhang, Liu and Chen, `LoRA-One: One-Step Full Gradient Could Suffice for
      Fine-Tuning Large Language Models, Provably and Efficiently
      <https://arxiv.org/abs/2502.01235>`_, 2025.
    """
    _check_gamma(gamma)

    def factors(
        w: Matrix, g: jax.Array, rank: int, scale: jax.Array, key: jax.Array
    ) -> Factors:
        _check_rank("lora_one", rank, min(g.shape), g.shape)
        u, s, vt = truncated_svd(-g, rank, key)
        return _divide_evenly(s * reciprocal(s[0]) / gamma, u, vt, jnp.sign(scale))

    return Initializer("lora_one", factors, needs_gradient=True)


def pissa() -> Initializer:
    """PiSSA: the first r singular directions of W0 are what trains.

    With W0 = U S Vᵀ, A = √(S_r/s) V_rᵀ and B = U_r √(S_r/s), and W0 keeps the rest,
    W0 − s B A (equations 2 to 4), so the layer does not change. Where s < 0 the roots
    are of S_r/|s|, and B changes its sign. A direction that W0 lacks starts as in
    `lora_one`. Needs W0, and r ≤ min(m, n).

    References:
      Meng, Wang and Zhang, `PiSSA: Principal Singular Values and Singular Vectors
      Adaptation of Large Language Models <https://arxiv.org/abs/2404.02948>`_, 2024.
    """

    def factors(
        w: jax.Array, g: Matrix, rank: int, scale: jax.Array, key: jax.Array
    ) -> Factors:
        _check_rank("pissa", rank, min(w.shape), w.shape)
        u, s, vt = truncated_svd(w, rank, key)
        return _divide_evenly(s, u, vt, scale)

    return Initializer("pissa", factors, needs_weight=True, changes_weight=True)


def olora() -> Initializer:
    """OLoRA: the first r columns of W0, orthonormalised, are what trains.

    With W0 = Q R, B = Q_r and A = R_r, the first columns and rows; W0 becomes
    W0 − s B A (Algorithm 1), so the layer does not change. Needs W0, and
    r ≤ min(m, n).

    References:
      Büyükakyüz, `OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
      <https://arxiv.org/abs/2406.01775>`_, 2024.
    """

    def factors(
        w: jax.Array, g: Matrix, rank: int, scale: jax.Array, key: jax.Array
    ) -> Factors:
        _check_rank("olora", rank, min(w.shape), w.shape)
        unit = power_of_two(jnp.abs(w).max())  # no backend's norms overflow
        q = jnp.linalg.qr(w[:, :rank] / unit)[0]
        return matmul(q.T, w), q

    return Initializer("olora", factors, needs_weight=True, changes_weight=True)


def _uniform(like: Matrix, rank: int, key: jax.Array) -> jax.Array:
    """LoRA's A for a layer of this shape and dtype."""
    inputs = like.shape[1]
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, (rank, inputs), like.dtype, -bound, bound)


def _divide_evenly(
    sigma: jax.Array, u: jax.Array, vt: jax.Array, scale: jax.Array
) -> Factors:
    """A and B of equal size with s B A = U diag(σ) Vᵀ.

    Where σ is 0 up to rounding, A and B would both be 0, and their gradients with
    them, for good. Instead B alone is 0, beside a row of A as long as the first.
    """
    lost = sigma <= 8 * jnp.finfo(sigma.dtype).eps * sigma[0]
    # Two roots, because σ/s may leave the range that they stay in.
    size = jnp.sqrt(jnp.where(lost, 0, sigma)) / jnp.sqrt(jnp.abs(scale))
    rows = jnp.where(lost, jnp.where(size[0] > 0, size[0], 1), size)
    return rows[:, None] * vt, u * (jnp.sign(scale) * size)


def _held(x: jax.Array, wanted: jax.Array) -> jax.Array:
    """`x`, or NaN where it fell below the range of its dtype and should not be 0."""
    below = jnp.abs(x).max() < jnp.finfo(x.dtype).tiny
    return jnp.where(below & jnp.any(wanted != 0), jnp.nan, x)


def _check_gamma(gamma: float) -> None:
    """Raises ValueError where γ is no positive number of float32."""
    limits = jnp.finfo(jnp.float32)
    check_number("gamma", gamma, float(limits.tiny), float(limits.max))


def _check_rank(name: str, rank: int, most: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a layer has too few directions for the rank."""
    if rank <= most:
        return
    layer = f"a layer of {shape[0]} outputs and {shape[1]} inputs"
    if not most:
        raise ValueError(
            f"`{name}` cannot start {layer} at any rank. Start it with another method, "
            "such as `gora` or `lora_one`: one call of `initialize_adapters` for each, "
            "with `pairs=`."
        )
    raise ValueError(
        f"`{name}` can start {layer} at ranks up to {most}, not at {rank}. Choose a "
        "smaller rank for it (in `allocate_ranks`, `max_rank=`)."
    )
