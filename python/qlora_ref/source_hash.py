"""One hash of the native sources, compiled into `_C` and compared at import, so that a stale binary is noticed.

Run by the build (`python source_hash.py ROOT cpu|cuda HEADER` writes the header) and imported by native.py.
A binary built without CUDA is not stale when only a .cu file has changed.
"""

import hashlib
import os
import sys
from pathlib import Path


def source_hash(root: Path, cuda: bool) -> str:
    """16 hex digits over names and contents of src/cpp (and src/cuda if `cuda`) under `root`."""
    digest = hashlib.sha256()
    for folder in ("src/cpp", "src/cuda") if cuda else ("src/cpp",):
        for path in sorted((root / folder).iterdir()):
            if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
                digest.update(f"{folder}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_header(root: Path, cuda: bool, header: Path) -> None:
    """Write `#define QLORA_SOURCE_HASH`; leave the file alone (and its time) if nothing changed."""
    text = f'#define QLORA_SOURCE_HASH "{source_hash(root, cuda)}"\n'
    if not header.exists() or header.read_text() != text:
        temporary = header.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, header)


if __name__ == "__main__":
    write_header(Path(sys.argv[1]), sys.argv[2] == "cuda", Path(sys.argv[3]))
