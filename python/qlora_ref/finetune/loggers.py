"""Optional loggers beside metrics.jsonl: tensorboard and wandb, only when asked for with --report-to."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli import UserError
from .config import TrainConfig

Log = Callable[[dict[str, Any]], None]


def check(config: TrainConfig) -> None:
    """UserError if the package that --report-to needs is not installed."""
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"--report-to {config.report_to} needs a package: pip install {config.report_to}.")


def logger(config: TrainConfig) -> Log:
    """A function that takes one record of metrics.jsonl; does nothing for "none"."""
    if config.report_to == "tensorboard":
        return _tensorboard(Path(config.output) / "tensorboard")
    if config.report_to == "wandb":
        return _wandb(config)
    return lambda record: None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}


def _tensorboard(folder: Path) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return log


def _wandb(config: TrainConfig) -> Log:
    import dataclasses

    import wandb

    run = wandb.init(project="qlora_ref", name=Path(config.output).name, config=dataclasses.asdict(config))
    return lambda record: run.log(_numbers(record), step=record["step"])
