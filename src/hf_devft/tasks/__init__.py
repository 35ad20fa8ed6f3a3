"""What a model is for: its rows, how they become batches, what is measured, what it answers."""

from hf_devft.tasks.task import (
    DEFAULT_TASK,
    TASKS,
    Encoding,
    Task,
    answers_prompts,
    label_options,
    named_labels,
    task_named,
    task_of,
)


__all__ = [
    "DEFAULT_TASK", "TASKS", "Encoding", "Task", "answers_prompts", "label_options", "named_labels", "task_named",
    "task_of",
]  # fmt: skip
