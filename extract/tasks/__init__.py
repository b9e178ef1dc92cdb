"""Where samples come from: named tasks and tables of the user's own.

task = load_task("rte", Path("glue"))                                       # GLUE's own layout
task = load_task("my.csv", text="premise", text_pair="claim", label="gold")  # a table
task.rows("train").head(1000)
"""

from pipeline.extract.tasks.base import SPLIT_SEED, SPLITS, Rows, Task, TaskError, TaskSpec, fixed_order
from pipeline.extract.tasks.registry import (
    canonical_name,
    is_named,
    load_task,
    refuse_grid,
    register_task,
    split_id,
    task_names,
)

__all__ = [
    "SPLITS",
    "SPLIT_SEED",
    "Rows",
    "Task",
    "TaskError",
    "TaskSpec",
    "canonical_name",
    "fixed_order",
    "is_named",
    "load_task",
    "refuse_grid",
    "register_task",
    "split_id",
    "task_names",
]
