"""One static HTML page for reading: question, both answers, the judge's words; filters and worst cases first.

The page opens from disk and loads nothing. Model output is data in it, never markup: it is embedded as JSON in
which "<", ">" and "&" are escaped, put on the page as text only, and a content security policy allows no script
but the page's own, known by its hash.
"""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

from .answers import Answer, Question
from .records import BadInput, Notes, item_of

_LABELS = {1: 1.0, 2: -1.0, 3: 0.0}


def verdicts_of(rows: list[dict[str, Any]], baseline: str = "chatgpt") -> list[dict[str, Any]]:
    """Pairwise or relative rows as: item, a (shown first), b, lead of a (None: unparsed), says, review."""
    out = []
    for row in rows:
        item = item_of(row)
        if "system" in row:
            a = row["first"]
            b = row["system"] if a == baseline else baseline
            x, y = row["score"]
            lead = None if (x, y) == (-1, -1) else x - y
            says = "unparsed" if lead is None else f"{a} {x:g} : {y:g} {b}"
        else:
            a, b = row["a"], row["b"]
            lead = _LABELS.get(row["score"])
            says = "unparsed" if lead is None else "tie" if lead == 0 else f"{a if lead > 0 else b} wins"
        review = row.get("review") or row.get("last_line") or ""
        out.append({"item": item, "a": a, "b": b, "lead": lead, "says": says, "review": review})
    return out


def html_report(
    title: str,
    questions: dict[int | str, Question],
    systems: dict[str, dict[int | str, Answer]],
    verdicts: list[dict[str, Any]],
    notes: list[str] | None = None,
    plot_svg: str | None = None,
) -> str:
    """The page. Verdicts on questions or systems without text are left out, counted and named on the page."""
    place = {item: i for i, item in enumerate(questions)}
    left_out = Notes()
    kept = []
    for v in verdicts:
        missing = [name for name in (v["a"], v["b"]) if v["item"] not in systems.get(name, {})]
        if v["item"] not in place:
            left_out.add("verdict on an unknown question (left out)", str(v["item"]))
        elif missing:
            left_out.add(f"verdict on {missing[0]}, whose answer is not given (left out)", str(v["item"]))
        else:
            kept.append({"q": place[v["item"]], **{k: v[k] for k in ("a", "b", "lead", "says", "review")}})
    if not kept:
        raise BadInput(f"no verdict can be shown: {' | '.join(left_out.lines(shown=2))}.")
    data = {
        "questions": [{"item": q.item, "text": q.text, "category": q.category or ""} for q in questions.values()],
        "answers": {
            name: [answers[item].text if item in answers else "" for item in questions]
            for name, answers in systems.items()
        },
        "verdicts": kept,
        "notes": [*(notes or []), *left_out.lines()],
        "plot": plot_svg and "data:image/svg+xml;base64," + base64.b64encode(plot_svg.encode()).decode(),
    }
    return _page(title, data)


def _page(title: str, data: dict[str, Any]) -> str:
    script = _file("report_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Filled in one pass over the template, so that nothing inside a value is ever filled in again.
    values = {
        "TITLE": html.escape(title),
        "SCRIPT_HASH": f"sha256-{digest}",
        "DATA": embed_json(data),
        "SCRIPT": script,
    }
    return re.sub("%(TITLE|SCRIPT_HASH|DATA|SCRIPT)%", lambda m: values[m[1]], _file("report_page.html"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def embed_json(data: Any) -> str:
    """JSON that no HTML parser can mistake for markup, whatever the strings hold."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
