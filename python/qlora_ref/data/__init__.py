"""The embedded default: a small pre-trained Llama and an instruction set, installed with the package.

Both were made by `tools/train_tiny_base.py` from the Python standard library; each folder says how and under
which licence. Nothing here is read at import.
"""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "heldout")
_HERE = Path(__file__).resolve().parent


def tiny_base_path() -> Path:
    """Folder of the embedded model and its tokenizer, in the form `transformers` loads.

    Raises FileNotFoundError when the package was installed without its data.
    """
    return _existing(_HERE / "tiny_base", "config.json")


def stdlib_qa_path(split: str) -> Path:
    """File of a split ("train" or "heldout"): one JSON object a line (`instruction`, `input`, `output`).

    The modules asked about in "heldout" are in no training text. Raises ValueError for another split, and
    FileNotFoundError when the package was installed without its data.
    """
    if split not in SPLITS:
        raise ValueError(f"stdlib_qa has no split {split!r}: ask for one of {', '.join(SPLITS)}.")
    return _existing(_HERE / "stdlib_qa" / f"{split}.jsonl")


def _existing(path: Path, needed: str = "") -> Path:
    if not (path / needed).exists():
        raise FileNotFoundError(
            f"{path / needed} is missing from this installation: install qlora_ref again with its data, "
            "or rebuild it from a checkout with python tools/train_tiny_base.py."
        )
    return path
