"""Paths of leaves, and what their names say about LoRA factors.

One rule for names serves Flax NNX and Linen, qwix, tunix, MaxText, EasyDeL, Keras,
gemma (`lora/a`, `lora/b`), AXLearn (`lora_down`, `lora_up`) and PEFT-style trees.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

Layout: TypeAlias = Literal["jax", "torch"]
"""`"jax"`: A is `(*in, r)`, B is `(r, *out)`. `"torch"`: `(r, *in)`, `(out, r, *)`."""

# Containers around a leaf. They come and go: `nnx.Optimizer` shows `.value` to
# `init` and hides it from `update`.
_BOXES = frozenset({"value", "raw_value", "array"})
# The parameter of a layer that is itself the factor, and PEFT's adapter name.
_WEIGHTS = frozenset({"kernel", "weight", "weights", "default"})

# `q_lora` or `kv_lora_rank` (multi-head latent attention) end differently.
_FACTOR = re.compile(
    r"(?P<stem>(?:.*[^A-Za-z])?)(?i:lora)_"
    r"(?P<kind>(?:kernel_|embeddings?_)?)(?P<role>a|b|A|B|down|up)"
)
_BARE = re.compile(r"a|b|A|B|down|up")
_OWNER = re.compile(r"lora(?:[^a-z].*)?", re.IGNORECASE)  # not `q_lora`: that is MLA

_OTHER = {"a": "b", "b": "a", "A": "B", "B": "A", "down": "up", "up": "down"}
# What an adapter wraps, and the names of the only weight of a layer.
_WRAPPED = frozenset({"base_module", "base_layer"})
_EMBEDDINGS = {("embedding_", "A"), ("embedding_", "B")}
_PLAIN_STEMS = frozenset({"", "kernel_", "w_", "weight_"})


class FactorName(NamedTuple):
    """What the path of a factor says.

    Attributes:
      owner: Path of the module that holds both factors; empty at the top.
      adapter: PEFT's name of the adapter; empty without one.
      stem: What stands before `lora`, as `kernel_` in qwix's `kernel_lora_a`.
      kind: What stands behind it, as `embedding_` in PEFT's `lora_embedding_A`.
      sides: `"a/b"` or `"down/up"`, how the two factors are told apart.
      role: `"a"` for the factor on the input side, `"b"` on the output side.
      layouts: The layouts that the name allows; shapes decide between two.
      partner: The path that the other factor would have.
      rank_leads: Whether B has its rank in front of all features, heads too: all
        stacks with such names (qwix and tunix, gemma) have it there.
    """

    owner: str
    adapter: str
    stem: str
    kind: str
    sides: str
    role: Literal["a", "b"]
    layouts: tuple[Layout, ...]
    partner: str
    rank_leads: bool

    @property
    def group(self) -> tuple[str, ...]:
        """Equal for the two factors of a pair, and for no others."""
        return self.owner, self.adapter, self.stem, self.kind, self.sides

    @property
    def weight(self) -> tuple[str, ...]:
        """Equal for factors whose names show that they adapt one weight.

        They do not always: `x/lora_a` and `x/base_module/lora_a` do, and so do PEFT's
        `x/lora_A/one/weight` and `x/lora_A/two/weight`.
        """
        parts = self.owner.split("/")
        inner = parts[:-1] if parts[-1] == "lora" else parts
        if inner and inner[-1] in _WRAPPED:
            parts = inner
        while parts and parts[-1] in _WRAPPED:
            parts = parts[:-1]
        stem = "" if self.stem in _PLAIN_STEMS else self.stem
        return "/".join(parts), stem, self.sides


def path_segments(path: str | Sequence[Any]) -> tuple[str, ...]:
    """The parts of a key path or of a string, without containers at the end.

    `/`, `.` and brackets separate: `['q']['lora_a'].value`, `q.lora_a` and
    `q/lora_a` are all `("q", "lora_a")`.
    """
    if not isinstance(path, str):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        path = "/".join(keys)
    segments = [part for part in re.split(r"[/.,()\[\]'\" ]+", path) if part]
    while len(segments) > 1 and segments[-1] in _BOXES:
        segments.pop()
    return tuple(segments)


def normalize_path(path: str | Sequence[Any]) -> str:
    """`path_segments` joined by `/`: how this package writes and compares paths."""
    return "/".join(path_segments(path))


def parse_factor_name(path: str) -> FactorName | None:
    """What a normalised path says about a LoRA factor; None if it names none."""
    segments = path.split("/")
    suffix = []
    while len(segments) > 1 and segments[-1] in _WEIGHTS:
        suffix.append(segments.pop())
    # PEFT names an adapter: `lora_A/task/weight`, `lora_embedding_A/task`. It is part
    # of what makes a pair.
    adapter = []
    above = _FACTOR.fullmatch(segments[-2]) if len(segments) > 1 else None
    if above and (suffix or (above["kind"], above["role"]) in _EMBEDDINGS):
        adapter.append(segments.pop())
    *parents, last = segments

    match = _FACTOR.fullmatch(last)
    if match:
        stem, kind, role = match.group("stem", "kind", "role")
    elif parents and _BARE.fullmatch(last) and _OWNER.fullmatch(parents[-1]):
        stem, kind, role = "", "", last
    else:
        return None

    other = last.removesuffix(role) + _OTHER[role]
    return FactorName(
        owner="/".join(parents),
        adapter="".join(adapter),
        stem=stem,
        kind=kind,
        sides="down/up" if role in ("down", "up") else "a/b",
        role="a" if role in ("a", "A", "down") else "b",
        layouts=_layouts(suffix, embedding="embedding_" in kind, upper=role in "AB"),
        partner="/".join([*parents, other, *adapter, *reversed(suffix)]),
        rank_leads=bool(stem) or match is None,
    )


def _layouts(suffix: list[str], *, embedding: bool, upper: bool) -> tuple[Layout, ...]:
    """PEFT's `lora_A.weight` and `lora_embedding_A` are PyTorch's; `.kernel` is Flax's.

    `lora_a.weight` is either (Equinox's Linear, AXLearn), and so is a bare `lora_A`.
    """
    is_weight = bool({"weight", "weights"} & set(suffix))
    if "kernel" in suffix or not (is_weight or upper):
        return ("jax",)
    if upper and (is_weight or embedding):
        return ("torch",)
    return ("jax", "torch")
