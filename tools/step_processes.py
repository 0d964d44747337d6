"""Training steps of all arms by turns, each arm in a process of its own that lives on: a noisy neighbour meets all.

Peak memory is a property of a process, and processes differ (where their memory lies): several generations are needed.
"""

import json
import random
import subprocess
import sys
import tempfile
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
        """Its next line. RuntimeError with its last words if it has stopped."""
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"training step of {self.arm} failed: {self._errors.read().strip().splitlines()[-1:]}")
        return json.loads(line)

    def step(self) -> dict:
        """Seconds and page faults of one step."""
        print("step", file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> dict:
        """Memory, and the floor of a `rest`."""
        self._process.stdin.close()
        result = self.answer()
        self._process.wait()
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def generation(arms: tuple[str, ...], model: str, threads: int, rounds: int) -> dict[str, dict]:
    """By arm: lists of `seconds` and `page_faults`, and what its process said at the end.

    An arm that cannot run is reported and left out.
    """
    processes: list[StepProcess] = []
    try:
        for arm in arms:
            process = StepProcess(arm, model, threads)
            try:
                process.answer()
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            processes.append(process)
        steps: dict[str, list[dict]] = {process.arm: [] for process in processes}
        for _ in range(rounds):
            for process in random.sample(processes, len(processes)):
                steps[process.arm].append(process.step())
        return {p.arm: p.end() | {key: [s[key] for s in steps[p.arm]] for key in steps[p.arm][0]} for p in processes}
    finally:
        for process in processes:
            process.kill()
