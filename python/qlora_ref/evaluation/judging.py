"""Asking a judge about every pair in both presentation orders, once each, however often the run is interrupted.

A verdict whose text cannot be parsed is a rating of the class "unparsed" (-1), kept with its words. A call that
failed for good is no rating at all: it is listed, and a resumed run asks again.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answers import Answer, Question
from .endpoint import CallFailed, Endpoint, EndpointRefuses, Reply
from .judge_parse import UNPARSED, last_line, parse_relative, parse_threeclass
from .judge_prompts import MAX_TOKENS, TEMPERATURE, judge_messages, prompt_id
from .ledger import Ledger, complete_keys
from .records import BadInput, item_of

_FAILURES_IN_A_ROW = 10


@dataclass(frozen=True)
class Job:
    """One question with two answers in one presentation order; `first` is shown first."""

    first: str
    second: str
    question: Question
    answer_1: Answer
    answer_2: Answer
    kind: str  # relative, threeclass, oa-threeclass

    @property
    def key(self) -> tuple:
        return (self.first, self.second, self.question.item)

    def messages(self) -> list[dict[str, str]]:
        q = self.question
        return judge_messages(self.kind, q.category, q.text, self.answer_1.text, self.answer_2.text)


Judge = Callable[[Job], Reply]


def make_jobs(
    kind: str,
    questions: dict[int | str, Question],
    systems: dict[str, dict[int | str, Answer]],
    items: list[int | str],
    baseline: str | None = None,
) -> list[Job]:
    """Every ordered pair of systems (relative: every pair with the baseline), every item of `items`."""
    if len(systems) < 2:
        raise BadInput("judging needs the answers of at least two systems: --answers A=FILE --answers B=FILE.")
    if kind == "relative" and baseline not in systems:
        raise BadInput(f"the baseline {baseline!r} has no answers; add --answers {baseline}=FILE or name another.")
    pairs = [p for p in itertools.permutations(systems, 2) if kind != "relative" or baseline in p]
    return [Job(a, b, questions[item], systems[a][item], systems[b][item], kind) for a, b in pairs for item in items]


def row_key(row: dict[str, Any], baseline: str | None = None) -> tuple:
    """The Job key a stored row belongs to."""
    if "system" in row:
        first = row["first"]
        return (first, row["system"] if first == baseline else baseline, item_of({**row, "_where": "row"}))
    return (row["a"], row["b"], item_of({**row, "_where": "row"}))


def fingerprint(jobs: list[Job], model: str) -> dict[str, Any]:
    """What the ratings depend on; a run may be resumed only under the same."""
    digest = hashlib.sha256()
    for job in jobs:
        digest.update(json.dumps([job.key, job.messages()], ensure_ascii=False).encode())
    return {
        "kind": jobs[0].kind,
        "model": model,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "jobs": len(jobs),
        "prompts_sha256": digest.hexdigest(),
    }


@dataclass(frozen=True)
class Estimate:
    """Before the start: calls, prompt tokens, and the most completion tokens they may use; dollars or nan."""

    calls: int
    prompt_tokens: int
    max_completion_tokens: int
    how: str
    max_cost: float

    def __str__(self) -> str:
        cost = (
            "cost unknown (no --price-in, --price-out)"
            if math.isnan(self.max_cost)
            else f"at most ${self.max_cost:.2f}"
        )
        return (
            f"{self.calls:,} calls; {self.prompt_tokens:,} prompt tokens ({self.how}); at most "
            f"{self.max_completion_tokens:,} completion tokens; {cost}"
        )


def estimate(
    jobs: list[Job],
    count_tokens: Callable[[str], int] | None = None,
    price_in: float | None = None,
    price_out: float | None = None,
) -> Estimate:
    """Token counts and cost of `jobs`. Prices in dollars per million tokens; without a tokenizer, 4 bytes a token."""
    count = count_tokens or (lambda text: -(-len(text.encode("utf-8")) // 4))
    tokens = sum(count(message["content"]) for job in jobs for message in job.messages())
    most = len(jobs) * MAX_TOKENS
    cost = math.nan
    if price_in is not None and price_out is not None:
        cost = (tokens * price_in + most * price_out) / 1e6
    return Estimate(len(jobs), tokens, most, "counted" if count_tokens else "estimated at 4 bytes each", cost)


def endpoint_judge(endpoint: Endpoint) -> Judge:
    return lambda job: endpoint.chat(job.messages(), temperature=TEMPERATURE, max_tokens=MAX_TOKENS)


class ReplayJudge:
    """Serves recorded ratings instead of asking: for tests, and for reading published files again."""

    def __init__(self, rows: list[dict[str, Any]], baseline: str | None = None):
        self._texts: dict[tuple, str] = {}
        for row in rows:
            text = row.get("review") or row.get("last_line")
            if text is None:
                raise BadInput(f"{row['_where']}: a recorded rating needs review or last_line to be replayed.")
            self._texts[row_key(row, baseline)] = text

    def __call__(self, job: Job) -> Reply:
        if job.key not in self._texts:
            raise CallFailed(f"nothing recorded for {job.first} before {job.second}, item {job.question.item}")
        return Reply(self._texts[job.key])


def rating_row(job: Job, reply: Reply, baseline: str | None) -> dict[str, Any]:
    """The row to store, in the schema of the published files, with the whole review."""
    q, text = job.question, reply.text
    prompt = prompt_id(job.kind, q.category)
    more = {
        q.key: q.item,
        "reviewer_id": prompt,
        "answer1_id": job.answer_1.answer_id,
        "answer2_id": job.answer_2.answer_id,
        "review": text,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
    if job.kind == "relative":
        system = job.second if job.first == baseline else job.first
        score = [int(x) if x == int(x) else x for x in parse_relative(text, prompt)]
        return {"system": system, "first": job.first, "score": score, **more}
    return {"a": job.first, "b": job.second, "score": parse_threeclass(text), "last_line": last_line(text), **more}


@dataclass
class Outcome:
    """How a run ended: new rows, rows that were there, places of unparsed rows, calls that failed for good."""

    asked: int = 0
    already: int = 0
    torn_bytes: int = 0
    unparsed: list[tuple] = field(default_factory=list)
    failed: list[tuple[tuple, str]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0


def run(
    jobs: list[Job],
    judge: Judge,
    out: str | Path,
    settings: dict[str, Any],
    baseline: str | None = None,
    workers: int = 4,
    progress: Callable[[Outcome, int], None] = lambda outcome, left: None,
) -> Outcome:
    """Asks for every job that `out` does not hold yet; each rating is on the disk before it is counted.

    Stops early, keeping what is there, when the endpoint refuses or when many calls in a row fail.
    On an interrupt the calls already under way are awaited and kept: they have been paid for.
    """
    with Ledger(out, settings, lambda row: row_key(row, baseline)) as ledger:
        todo = [job for job in jobs if job.key not in ledger.keys]
        outcome = Outcome(already=len(jobs) - len(todo), torn_bytes=ledger.torn_bytes)

        def store(job: Job, reply: Reply) -> None:
            row = rating_row(job, reply, baseline)
            ledger.append(row)
            outcome.asked += 1
            outcome.prompt_tokens += reply.prompt_tokens
            outcome.completion_tokens += reply.completion_tokens
            if row["score"] in (UNPARSED, [UNPARSED, UNPARSED]):
                outcome.unparsed.append(job.key)
            progress(outcome, len(todo) - outcome.asked - len(outcome.failed))

        def fail(job: Job, error: CallFailed) -> None:
            outcome.failed.append((job.key, str(error)))

        ask_all(judge, todo, workers, store, fail)
        return outcome


def ask_all(
    ask: Callable[[Any], Any],
    jobs: list[Any],
    workers: int,
    store: Callable[[Any, Any], None],
    fail: Callable[[Any, CallFailed], None],
) -> None:
    """`store(job, ask(job))` for every job, `workers` calls at a time, storing in the calling thread.

    CallFailed goes to `fail`; any other error, too many failures in a row, or an interrupt end the run after the
    calls under way have been stored.
    """
    waiting, in_a_row = iter(jobs), 0
    with ThreadPoolExecutor(max_workers=workers) as pool:
        flying: dict[Future, Any] = {pool.submit(ask, job): job for job in itertools.islice(waiting, workers)}
        try:
            while flying:
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    job = flying.pop(future)
                    try:
                        store(job, future.result())
                        in_a_row = 0
                    except CallFailed as error:
                        fail(job, error)
                        in_a_row += 1
                        if in_a_row >= _FAILURES_IN_A_ROW:
                            raise EndpointRefuses(f"{in_a_row} calls in a row failed; the last: {error}") from None
                    for following in itertools.islice(waiting, 1):
                        flying[pool.submit(ask, following)] = following
        finally:
            for future, job in flying.items():
                if future.exception() is None:
                    store(job, future.result())


def keys_in(out: str | Path, baseline: str | None) -> set[Hashable]:
    """Keys of the ratings that `out` already holds, without opening it for writing."""
    return complete_keys(out, lambda row: row_key(row, baseline))
