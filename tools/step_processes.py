"""Training steps of all arms by turns, each arm in a process of its own that lives on: a noisy neighbour meets all.

Peak memory is a property of a process, and processes differ (where their memory lies): several generations are needed.
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class StepProcess:
    """bench_cpu_steps.py --serve: makes a step when told to."""

    def __init__(self, arm: str, model: str, threads: int) -> None:
        script = Path(__file__).with_name("bench_cpu_steps.py")
        command = [sys.executable, str(script), "--arm", arm, "--model", model, "--threads", str(threads), "--serve"]
        self.arm, self._errors = arm, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def answer(self) -> dict:
        """Its next line."""
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"it stopped: {self._errors.read().strip().splitlines()[-1:]}")
        return json.loads(line)

    def step(self) -> dict:
        """Seconds and page faults of one step."""
        print("step", file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> dict:
        """Memory, and the floor of a `rest`. The process is gone then: another one may be measuring the floor next."""
        self._process.stdin.close()
        last = self.answer()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        return last

    def kill(self) -> None:
        """And close what it had open."""
        self._process.kill()
        with self._errors, contextlib.suppress(OSError), self._process:  # a pipe may hold a line that it never read
            pass


def generation(arms: tuple[str, ...], model: str, threads: int, rounds: int) -> dict[str, dict]:
    """By arm: lists of `seconds` and `page_faults`, and what its process said at the end.

    An arm whose process fails is reported and left out.
    """
    processes = {arm: StepProcess(arm, model, threads) for arm in arms}
    steps: dict[str, list[dict]] = {arm: [] for arm in arms}
    ends: dict[str, dict] = {}

    def ask(arm: str, question: Callable[[StepProcess], dict]) -> dict:
        try:
            return question(processes[arm])
        except (RuntimeError, OSError, ValueError) as error:
            print(f"training step of {arm} left out: {error}", file=sys.stderr)
            processes.pop(arm).kill()
            return {}

    try:
        for arm in arms:
            ask(arm, StepProcess.answer)
        for _ in range(rounds):
            for arm in random.sample(list(processes), len(processes)):
                steps[arm].append(ask(arm, StepProcess.step))
        for arm in list(processes):
            ends[arm] = ask(arm, StepProcess.end)
    finally:
        for process in processes.values():
            process.kill()
    return {arm: ends[arm] | {key: [s[key] for s in steps[arm]] for key in steps[arm][0]} for arm in processes}
