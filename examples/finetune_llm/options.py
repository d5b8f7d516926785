"""The command line: every option once, with its default, its group and its help."""

import dataclasses
import math
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.presets import DEMO, PRESETS, QUICK_DEMO

KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIMIZERS = (
    "lora",
    "lora_nesterov",
    "lora_rite",
    "lorapro",
    "lorapro_adamw",
    "lorapro_adamw_nesterov",
)
STARTS = ("lora", "lora_ga", "gora", "lora_one", "pissa", "olora")
# What may be another when a run goes on: where it is computed, what is looked at.
ELSEWHERE = {"output", "plan", "preset", "strict"}
ELSEWHERE |= {"mesh", "topology", "memory", "cpu_devices"}
ELSEWHERE |= {"coordinator", "processes", "process", "cluster"}
WATCHING = {"evaluate_every", "sample_every", "save_every", "diagnostics"}
WATCHING |= {"evaluate", "questions", "answer_tokens"}

POSITIVE = ("rank", "alpha", "rank_budget", "start_batches", "rate", "rates", "epochs")
POSITIVE += ("steps", "batch", "accumulate", "length", "evaluate_every", "save_every")
POSITIVE += ("memory", "cpu_devices", "answer_tokens")


def option(group: str, default: Any, text: str, **more: Any) -> Any:
    """A field of `Options`: what `ArgumentParser.add_argument` needs goes along."""
    if isinstance(default, bool):
        more["action"] = "store_true"
    elif "type" not in more:
        more["type"] = type(default)
    metadata = {"group": group, "help": text, **more}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command was asked for; the defaults are those of the command line."""

    model: Path | None = option(
        "files", None, "the model's folder as Hugging Face lays it out", type=Path
    )
    data: Path | None = option(
        "files", None, "JSONL of messages, prompt and completion, or text", type=Path
    )
    validation: Path | None = option(
        "files", None, "the same, to evaluate on; else --held-out of --data", type=Path
    )
    output: Path = option(
        "files", Path("out/finetune_llm"), "everything is written here", type=Path
    )
    held_out: float = option("files", 0.05, "share of --data to evaluate on")
    strict: bool = option("files", False, "a bad line stops the run")

    rank: int = option("adapters", 16, "of all adapters")
    alpha: float = option("adapters", 32.0, "B A is multiplied by alpha / rank")
    rslora: bool = option("adapters", False, "multiply by alpha / √rank instead")
    targets: tuple[str, ...] = option(
        "adapters", KERNELS, "kernels to adapt", type=str, nargs="+", choices=KERNELS
    )
    start: str = option("adapters", "lora", "where the factors start", choices=STARTS)
    rank_budget: int | None = option(
        "adapters", None, "ranks by the gradient, at the cost of this rank", type=int
    )
    start_batches: int = option("adapters", 8, "whose gradient these two look at")
    dtype: str = option(
        "adapters", "bfloat16", "of the base", choices=("bfloat16", "float32")
    )
    qlora: str | None = option(
        "adapters", None, "a quantised base", type=str, choices=("nf4", "int8")
    )

    optimizer: str = option(
        "training", "lorapro_adamw_nesterov", "by name", choices=OPTIMIZERS
    )
    rate: float = option("training", 2e-5, "peak learning rate")
    rates: tuple[float, ...] = option(
        "training", (), "a sweep; the best on validation is kept", type=float, nargs="+"
    )
    epochs: float = option("training", 1.0, "passes over the data")
    steps: int | None = option("training", None, "instead of --epochs", type=int)
    batch: int = option("training", 16, "rows per step, on all devices together")
    accumulate: int = option("training", 1, "parts that a batch is computed in")
    length: int = option("training", 1024, "tokens per row")
    packing: bool = option("training", False, "several examples in a row")
    warmup: float = option("training", 0.03, "share of the steps, before the cosine")
    weight_decay: float = option("training", 0.0, "of the adapters")
    max_grad_norm: float = option("training", 1.0, "to clip at; 0 for not at all")
    remat: bool = option("training", False, "compute layers again in the backward pass")
    seed: int = option("training", 0, "of the factors and of the order of the data")

    evaluate_every: int = option("watching", 100, "steps between evaluations")
    sample_every: int = option("watching", 0, "steps between samples; 0 for none")
    save_every: int = option("watching", 100, "steps between checkpoints")
    diagnostics: bool = option("watching", False, "check the factors' gradients")

    mesh: str = option("scale", "", "such as fsdp=8,tensor=4; default: fsdp of all")
    plan: bool = option("scale", False, "compile, print memory per device, stop")
    topology: str | None = option(
        "scale", None, "for --plan without the hardware, such as v5e:8x8", type=str
    )
    memory: float | None = option(
        "scale", None, "GiB per device, if the device does not say", type=float
    )
    cpu_devices: int | None = option("scale", None, "simulate so many", type=int)
    coordinator: str | None = option("scale", None, "host:port of process 0", type=str)
    processes: int | None = option("scale", None, "how many there are", type=int)
    process: int | None = option("scale", None, "the number of this one", type=int)
    cluster: bool = option("scale", False, "find processes as a cluster does")

    evaluate: str | None = option(
        "evaluation", None, "answer --questions", type=str, choices=("gsm8k", "exact")
    )
    questions: Path | None = option(
        "evaluation", None, "JSONL of question and answer", type=Path
    )
    answer_tokens: int = option("evaluation", 256, "at most, per answer")

    preset: str | None = option(
        "ready-made", None, "settings of a publication", type=str, choices=PRESETS
    )
    demo: bool = option("ready-made", False, "pretrain a small model here and use it")
    quick: bool = option("ready-made", False, "with --demo: under 2 minutes")

    def settings(self) -> dict[str, Any]:
        """What makes a run what it is, wherever and however it is computed, as JSON.

        A sweep may have other rates the next time: each has a folder of its own.
        """
        apart = ELSEWHERE | WATCHING | ({"rate"} if self.rates else set())
        chosen = dataclasses.asdict(self) | {"rates": bool(self.rates)}
        chosen = {k: v for k, v in chosen.items() if k not in apart}
        plain = lambda v: list(v) if isinstance(v, tuple) else v
        return {
            k: str(v.resolve()) if isinstance(v, Path) else plain(v)
            for k, v in chosen.items()
        }


class Parser(ArgumentParser):
    """Says what is wrong as every other error is said, without the usage."""

    def error(self, message: str) -> Any:  # noqa: D102
        raise Refused(f"{message}; --help lists the options.")


def new_parser(description: str) -> ArgumentParser:
    """The parser; options that are not given do not come out of it."""
    parser = Parser(
        prog="finetune_llm",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        argument_default=SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Options):
        more = dict(field.metadata)
        name = more.pop("group")
        group = groups.get(name) or parser.add_argument_group(name)
        groups[name] = group
        more["help"] += _default(field.default)
        group.add_argument("--" + field.name.replace("_", "-"), **more)
    return parser


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool) or value in ("", ()):
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f" (default: {shown})"


def parse(argv: Sequence[str] | None, description: str) -> Options:
    """Options of a command line: what it says, else the preset's, else the defaults.

    Raises:
      Refused: Unknown options, missing ones, or ones that exclude each other.
    """
    given: Namespace = new_parser(description).parse_args(argv)
    chosen = dict(PRESETS[given.preset].settings) if "preset" in given else {}
    if "demo" in given:
        chosen = {**DEMO, **(QUICK_DEMO if "quick" in given else {}), **chosen}
    if "rate" in given and "rates" not in given:
        chosen["rates"] = ()
    asked = {k: tuple(v) if type(v) is list else v for k, v in vars(given).items()}
    options = Options(**{**chosen, **asked})
    _check(options)
    return options


def _check(options: Options) -> None:
    """Refuses what can be seen in the options alone."""
    if not options.demo:
        missing = [x for x in ("model", "data") if not getattr(options, x)]
        if options.plan:
            missing = [x for x in missing if x != "data"]
        if missing:
            names = " and ".join("--" + x for x in missing)
            raise Refused(f"give {names}, or --demo to try it without any.")
    for name in POSITIVE:
        if getattr(options, name) is not None:
            _positive(options, name)
    if options.batch % options.accumulate:
        raise Refused(
            f"--accumulate {options.accumulate} does not divide --batch "
            f"{options.batch}: both parts of a batch have to be alike."
        )
    if not 0 < options.held_out < 1:
        raise Refused(f"--held-out {options.held_out:g} is no share between 0 and 1.")
    if options.evaluate and not (options.questions or options.demo):
        raise Refused(f"--evaluate {options.evaluate} needs --questions, a JSONL file.")
    if options.topology and not options.plan:
        raise Refused("--topology is for --plan: nothing can run on it here.")
    if options.quick and not options.demo:
        raise Refused("--quick is for --demo; --steps shortens other runs.")
    if options.demo and options.plan:
        raise Refused("--plan is for --model; the demo fits on any device.")


def _positive(options: Options, name: str) -> None:
    value = getattr(options, name)
    for number in value if isinstance(value, tuple) else (value,):
        if not 0 < number < math.inf:
            shown = "--" + name.replace("_", "-")
            raise Refused(f"{shown} {number:g} is not positive.")
