"""Which versions of other people's packages we were verified with, and the sentence when one is missing or old."""

from importlib import metadata

# package -> (lowest version that our tests were run with, extra of ours that installs it)
MINIMUM = {
    "transformers": ("5.0.0", "hf"),
    "peft": ("0.20.0", "hf"),
    "accelerate": ("1.10.0", "hf"),
    "safetensors": ("0.5.0", "hf"),
}
FSDP2_TORCH = "2.12.0"  # before it, fully_shard gave uint8 shards requires_grad=True and raised (pytorch#177844)


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0); a pre-release suffix is dropped."""
    parts = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


def at_least(installed: str, minimum: str) -> bool:
    return _numbers(installed) >= _numbers(minimum)


def require(package: str, purpose: str) -> None:
    """Raise ImportError, with the command that mends it, unless `package` is installed and new enough."""
    minimum, extra = MINIMUM[package]
    install = f"pip install 'qlora_ref[{extra}]'"
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{purpose} needs the package {package}, which is not installed: {install}") from None
    if not at_least(installed, minimum):
        raise ImportError(
            f"{purpose} needs {package} >= {minimum}, and {installed} is installed: "
            f"pip install -U '{package}>={minimum}'"
        )


def require_fsdp2() -> None:
    """Raise RuntimeError unless torch can shard frozen uint8 parameters."""
    import torch

    if not at_least(torch.__version__, FSDP2_TORCH):
        raise RuntimeError(
            f"FSDP2 over packed uint8 weights needs torch >= {FSDP2_TORCH} (pytorch#177844), and {torch.__version__} "
            f"is installed: pip install -U 'torch>={FSDP2_TORCH}', or train with DDP, which any supported torch can do"
        )
