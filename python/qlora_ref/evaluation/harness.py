"""lm-evaluation-harness (EleutherAI) on a model that is already loaded: quantized, with an adapter, as it is.

    from qlora_ref.evaluation.harness import run_harness
    results = run_harness(model, tokenizer, ["hellaswag", "arc_easy"], limit=100)

Needs `pip install lm_eval`. The harness's own tasks fetch data sets from the network unless they are cached; a folder
of task files over local data (`include_path`) stays offline.
"""

from pathlib import Path
from typing import Any


def harness_model(model: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """`model` as the harness's HFLM. Raises RuntimeError when lm_eval is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError(f"lm-evaluation-harness is missing ({error}); pip install lm_eval.") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    batch_size: int = 8,
    limit: int | None = None,
    shots: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """task -> metric -> value. Raises ValueError for a task that the harness does not know."""
    lm = harness_model(model, tokenizer, batch_size)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"the harness knows no task {', '.join(unknown)}; give your own with --include-path DIR.")
    results = simple_evaluate(
        lm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1000
    )["results"]
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results.items()
    }
