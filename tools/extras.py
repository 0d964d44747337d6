"""Print the requirements of some extras of pyproject.toml, for pip: `pip install $(python tools/extras.py hf test)`.

The tests run on the source tree with an in-tree build, so only the requirements are wanted, not the package.
"""

import re
import sys
from pathlib import Path


def extras(text: str) -> dict[str, list[str]]:
    """The [project.optional-dependencies] table. A small reader: tomllib is not in Python 3.10."""
    table = re.search(r"^\[project\.optional-dependencies\]\n(.*?)(?=^\[)", text, re.M | re.S).group(1)
    return {
        name: re.findall(r'"([^"]+)"', items) for name, items in re.findall(r"^(\w+) = \[(.*?)\]", table, re.M | re.S)
    }


if __name__ == "__main__":
    known = extras((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
    print(" ".join(requirement for name in sys.argv[1:] for requirement in known[name]))
