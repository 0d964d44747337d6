"""Whether a run keeps products under checkpointing (checkpointing.py) when nobody said: on a CPU, where memory allows.

The bits are the same and a step is shorter, so memory alone decides. On a card it is not done: what it gains there was
never measured, and memory is what QLoRA is used for there.
"""

from pathlib import Path

import torch

from ..memory.architecture import ConfigError, read_config
from ..memory.estimate import estimate
from .config import TrainConfig
from .report import memory_settings


def kept_by_default(config: TrainConfig, device: torch.device) -> bool:
    """Whether this run (its dtype resolved) takes at most half of the available memory if it keeps products.

    The other half is for what the estimate does not see, and for other programs.
    """
    if device.type != "cpu" or not config.gradient_checkpointing or config.quant_type == "none":
        return False
    available, needed = available_memory(), _needed(config.replace(keep_products=True))
    return available is not None and needed is not None and 2 * needed <= available


def _needed(config: TrainConfig) -> int | None:
    """Bytes by the estimate; None where it does not know the model, or only roughly (T5)."""
    try:
        architecture = read_config(config.model)
        result = estimate(architecture, memory_settings(config))
    except ConfigError:
        return None
    return None if architecture.encoder_decoder else result.needed + result.host  # on a CPU both are one memory


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without swapping: what the kernel says and its control groups leave.

    None where neither can be read (not Linux). Of control groups, version 2 only.
    """
    try:
        kernel = 1024 * _number(root / "proc/meminfo", "MemAvailable:")
        return min([kernel, *map(_left, _limited_groups(root))])
    except (OSError, ValueError, LookupError):
        return None


def _limited_groups(root: Path) -> list[Path]:
    """Folders of the control groups around this process that have a limit."""
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    folder = root / "sys/fs/cgroup" / own.strip("/")
    limits = (f / "memory.max" for f in (folder, *folder.parents))
    return [limit.parent for limit in limits if limit.exists() and limit.read_text().strip() != "max"]


def _left(group: Path) -> int:
    """Bytes up to the group's limit. File cache that was not used lately is given up before anything is refused."""
    limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    return limit - used + _number(group / "memory.stat", "inactive_file")


def _number(file: Path, name: str) -> int:
    """The number behind `name` in a file of lines "name number"."""
    return int(dict(line.split()[:2] for line in file.read_text().splitlines())[name])
