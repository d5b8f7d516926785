"""What LoRA-Pro may cost, and whether a run of `adjust.py` stays within it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

Row = dict[str, Any]

TREE = "llama2-7b"
# Of a step with `lorapro()` to one of AdamW alone, by platform and rank.
STEP = {"cpu": {8: 1.6, 16: 2.0}, "gpu": {8: 1.5, 16: 1.5, 64: 1.5}}
LITERAL_SPEED, LITERAL_MEMORY = 500, 50
COMPILE_S = 3.0
ADAMW_STEP = {TREE: 7.5, TREE + "-leaves": 13.0}
ADAMW_TEMP = 3.3
# Of `lorapro_adamw` as compiled, by platform and form of the tree.
ADAMW_COMPILED = {
    ("cpu", "one by one"): {"temp_per_factor_bytes": ADAMW_TEMP},
    ("cpu", "leaves"): {"temp_per_factor_bytes": ADAMW_TEMP, "compile_s": 10.0},
    ("cuda", "leaves"): {"temp_per_factor_bytes": 2.4, "kernels": 400},
}
TEMP = 1.5
CLIFF = 3.0


class Check(NamedTuple):
    """One figure beside its limit; `within` says whether it is on the right side."""

    what: str
    figure: float
    limit: float
    within: bool


def checks(rows: Sequence[Row], platform: str) -> list[Check]:
    """All that can be said of these rows, in the order of the limits above."""
    at = {(row["tree"], row["rank"], row["contender"]): row for row in rows}
    found = []
    for (tree, rank, name), row in at.items():
        if tree == TREE and name == "lorapro + adamw":
            if limit := STEP[platform].get(rank):
                what = f"step, times AdamW's, r={rank}"
                found.append(_at_most(what, row["x_adamw"], limit))
            if rank == 8 and platform == "cpu":
                compiled = row["trace_s"] + row["compile_s"]
                found.append(_at_most("compilation, s, r=8", compiled, COMPILE_S))
        if tree == TREE and name == "lorapro":
            temp = row["temp_per_factor_bytes"]
            found.append(_at_most(f"temporaries, times factors, r={rank}", temp, TEMP))
        if tree == TREE and name == "literal":
            speed, memory = row["x_lorapro"], row["x_temp_of_a_pair"]
            what = "the paper's formula, times the {}, r=8"
            found.append(_at_least(what.format("time"), speed, LITERAL_SPEED))
            found.append(_at_least(what.format("memory"), memory, LITERAL_MEMORY))
        if tree in ADAMW_STEP and (platform, rank, name) == ("cpu", 8, "lorapro_adamw"):
            what = f"{tree}, lorapro_adamw: {{}}, r=8"
            for limit, key, of in (
                (ADAMW_STEP[tree], "x_adamw", "step, times AdamW's"),
                (ADAMW_STEP[tree], "x_adamw_cpu", "the same in processor time"),
                (ADAMW_TEMP, "temp_per_factor_bytes", "temporaries, times factors"),
            ):
                found.append(_at_most(what.format(of), row[key], limit))
        if name == "lorapro" and rank > 16 and (tree, 16, name) in at:
            cost = lambda row: row["best_ms"] / row["factor_bytes"]
            cliff = cost(row) / cost(at[tree, 16, name])
            what = f"{tree}: cost a byte at r={rank}, times that at 16"
            found.append(_at_most(what, cliff, CLIFF))
    return found


def compiled(rows: Sequence[Row], platform: str) -> list[Check]:
    """What can be said of rows of `compiled.py` with all layers of the model."""
    found = []
    deepest = max(row["layers"] for row in rows)
    for row in rows:
        if row["contender"] != "lorapro_adamw" or row["layers"] < deepest:
            continue
        what = f"lorapro_adamw, {row['form']}, r={row['rank']}: "
        limits = ADAMW_COMPILED.get((platform, row["form"]), {})
        for figure, limit in limits.items():
            found.append(_at_most(what + figure, row[figure], limit))
    return found


def table(found: Sequence[Check]) -> Table:
    """For people."""
    result = Table("figure", box=box.SIMPLE)
    for column in ("found", "limit", "within"):
        result.add_column(column, justify="right")
    for check in found:
        verdict = "yes" if check.within else "NO"
        result.add_row(check.what, f"{check.figure:.2f}", f"{check.limit:g}", verdict)
    return result


def _at_most(what: str, figure: float, limit: float) -> Check:
    return Check(what, figure, limit, figure <= limit)


def _at_least(what: str, figure: float, limit: float) -> Check:
    return Check(what, figure, limit, figure >= limit)
