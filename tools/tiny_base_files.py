"""Files of the embedded default: the model folder, the instruction set, their manifests and the model's page.

Everything is written beside its place first and moved there with `os.replace` once it reads back as written.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from stdlib_corpus import HELD_OUT_SHARE, Module

MAX_FILE_BYTES = 6_000_000


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    if path.read_text(encoding="utf-8") != text:
        raise OSError(f"{path} does not read back as it was written: check the disk and run again.")


def write_instructions(modules: list[Module], rows_of: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """train.jsonl, heldout.jsonl and MANIFEST.json (origin, counts, hashes, held-out modules)."""
    manifest: dict[str, Any] = {
        "python": platform.python_version(),
        "licence": "PSF-2.0",
        "splits": {},
        "heldout_modules": [m.name for m in modules if m.held_out],
    }
    for split, rows in rows_of.items():
        text = "".join(json.dumps(r) + "\n" for r in rows)
        write_atomically(folder / f"{split}.jsonl", text)
        manifest["splits"][split] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        print(f"{folder / split}.jsonl: {len(rows)} rows", flush=True)
    write_atomically(folder / "MANIFEST.json", json.dumps(manifest, indent=1) + "\n")


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    modules: list[Module],
    record: dict[str, Any],
    folder: Path,
    heldout_loss: Callable[[LlamaForCausalLM], float],
) -> None:
    """Write the bf16 model to a temporary folder, read it back, evaluate that, then move it into place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        use_portable_class_name(Path(temporary) / "tokenizer_config.json")
        weights = Path(temporary) / "model.safetensors"
        if weights.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(
                f"model.safetensors has {weights.stat().st_size:,} bytes, more than "
                f"{MAX_FILE_BYTES:,}: make the model smaller."
            )
        again: Any = LlamaForCausalLM.from_pretrained(temporary, dtype=torch.bfloat16)
        for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            if not torch.equal(a, b):
                raise OSError(f"{name} does not read back as it was saved: check the disk and run again.")
        final = heldout_loss(again.float())
        record["final held-out loss (bf16 weights, fp32 arithmetic)"] = round(final, 4)
        record["parameters"] = f"{sum(p.numel() for p in again.parameters()):,}"
        for file in sorted(Path(temporary).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)
    files = [
        {
            "module": m.name,
            "file": m.path,
            "held_out": m.held_out,
            "sha256": hashlib.sha256(m.text.encode()).hexdigest(),
        }
        for m in modules
    ]
    manifest = {"python": platform.python_version(), "held_out_share": HELD_OUT_SHARE}
    lines = ",\n".join("  " + json.dumps(f) for f in files)
    text = json.dumps(manifest)[:-1] + ', "files": [\n' + lines + "\n]}\n"
    write_atomically(folder / "MANIFEST.json", text)
    write_atomically(folder / "README.md", readme(record))
    print(json.dumps(record, indent=1), flush=True)


def use_portable_class_name(path: Path) -> None:
    """transformers 5 writes a class name that 4.x does not know; both know PreTrainedTokenizerFast."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def readme(record: dict[str, Any]) -> str:
    versions = {
        "date": datetime.date.today().isoformat(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
    cells = {key: f"{v:,}" if isinstance(v, int) else v for key, v in {**record, **versions}.items()}
    return README.format(rows="\n".join(f"| {key} | {value} |" for key, value in cells.items()))


README = """# tiny_base: the embedded default model of qlora_ref

A small Llama with its own byte-level BPE tokenizer, pre-trained from random weights by
`tools/train_tiny_base.py` on the sources and docstrings of the Python standard library. It exists so that a
real QLoRA fine-tune runs on a fresh machine without a download. It writes text that looks like Python
documentation; it knows nothing else, and what it says about a function is a guess, not documentation.

The table is written by the script at the end of the run. Wall minutes include waiting for other work on the
machine.

| | |
|---|---|
{rows}

Losses are nats per token on evenly spaced windows of the held-out modules. About one module family in eight
is held out of the tokenizer, the pre-training text and the training questions; `MANIFEST.json` lists every
file with its SHA-256 and whether it was held out. Another Python patch version has slightly different text
and gives a slightly different model.

Every linear layer has `in_features` divisible by 256, the input embedding is tied to the output head, and the
special tokens `<|pad|>`, `<|bos|>`, `<|eos|>` are three different ids, so the end of an answer is a label.

## Licence

The training text is part of Python: Copyright (c) 2001 Python Software Foundation, all rights reserved, under
the Python Software Foundation License Version 2 (PSF-2.0), https://docs.python.org/3/license.html. Some
modules carry further notices of their authors in their sources. The weights are distributed under the licence
of qlora_ref (MIT).
"""
