"""Shipped configs by name, and the settings that fit a card, chosen with the memory estimate."""

import itertools
from dataclasses import replace
from importlib import resources
from typing import Any

from ..cli import UserError
from .config import TrainConfig, from_dict, suggestion


def names() -> list[str]:
    folder = resources.files(__package__) / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def text(name: str) -> str:
    """The YAML of a recipe with its comments. UserError with a suggestion for an unknown name."""
    if name not in names():
        raise UserError(f"there is no recipe '{name}'.{suggestion(name, names())} Known: {', '.join(names())}.")
    return (resources.files(__package__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe(name: str) -> dict[str, Any]:
    """Keys and values of a recipe."""
    import yaml

    return from_dict(yaml.safe_load(text(name)), f"recipe {name}")


def listing() -> str:
    """One line a recipe: its name and the first line of its comment."""
    first = {name: text(name).splitlines()[0].removeprefix("# ") for name in names()}
    width = max(map(len, first))
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in first.items())


def fit_to_card(config: TrainConfig, card_name: str) -> TrainConfig:
    """The same optimizer step on a card of so many GB: the largest micro-batch that fits. If none does, products are
    not kept under checkpointing, and then states have 8 bits.

    card_name: "24", "24GB", "48 GB, ECC on". UserError for an unknown card, or a model that fits with none of it.
    """
    from ..memory.architecture import ConfigError, read_config
    from ..memory.cards import CARDS
    from ..memory.estimate import estimate
    from .report import human, memory_settings

    digits = card_name.lower().removesuffix("gb").strip()
    card = next((c for c in CARDS if c.name == card_name or c.name.split()[0] == digits), None)
    if card is None:
        raise UserError(f"--card {card_name!r} is not known; known are {'; '.join(c.name for c in CARDS)}.")
    config = config.replace(dtype="bf16") if config.dtype == "auto" else config
    per_step = config.batch_size * config.grad_accum
    try:
        architecture = read_config(config.model)
        for bits, keep in itertools.product(
            dict.fromkeys((config.optimizer_bits, 8)), dict.fromkeys((bool(config.keep_products), False))
        ):
            for batch in (b for b in range(per_step, 0, -1) if per_step % b == 0):
                candidate = config.replace(batch_size=batch, grad_accum=per_step // batch)
                candidate = candidate.replace(optimizer_bits=bits, keep_products=keep)
                if estimate(architecture, memory_settings(candidate)).needed <= card.size:
                    return candidate
        least_settings = replace(memory_settings(config), batch=1, optimizer="adamw8", keep_products=False)
        least = estimate(architecture, least_settings).needed
    except ConfigError as error:
        raise UserError(f"--card: {error}") from None
    raise UserError(
        f"{config.model} does not fit on {card.name}: it needs about {human(least)} with --batch-size 1 and 8-bit "
        "states; lower --max-length or --lora-rank."
    )
