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

    None where one of them cannot be read (not Linux).
    """
    try:
        kernel = 1024 * _number(root / "proc/meminfo", "MemAvailable:")
        return min([kernel, *_left_in_groups(root)])
    except (OSError, ValueError, LookupError):
        return None


def _left_in_groups(root: Path) -> list[int]:
    """Bytes up to the limits of the control groups around this process, of version 1 and of version 2."""
    left = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            groups = _groups(root / "sys/fs/cgroup/memory", path, names[0])
            if not groups:
                raise LookupError("a limit that cannot be read")
            left += [_left(group, *names) for group in groups]
        elif not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            groups = _groups(root / "sys/fs/cgroup", path, names[0])
            left += [_left(g, *names) for g in groups if (g / names[0]).read_text().strip() != "max"]
    return left


def _groups(mount: Path, path: str, limit: str) -> list[Path]:
    """Folders of a group and of those around it, as far as they can be seen here."""
    folder = mount / path.strip("/")
    return [f for f in (folder, *folder.parents) if f.is_relative_to(mount) and (f / limit).exists()]


def _left(group: Path, limit: str, used: str, inactive: str) -> int:
    """File cache that was not used lately is given up before anything is refused. Without a limit: a huge number."""
    free = int((group / limit).read_text()) - int((group / used).read_text())
    return free + _number(group / "memory.stat", inactive)


def _number(file: Path, name: str) -> int:
    """The number behind `name` in a file of lines "name number"."""
    return int(dict(line.split()[:2] for line in file.read_text().splitlines())[name])
