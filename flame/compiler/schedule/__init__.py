"""Graph -> Schedule: which nodes run together, and where their results lie."""

from flame.compiler.schedule.task import Schedule, Task
from flame.compiler.schedule.unfused import one_task_a_node

__all__ = ["Schedule", "Task", "one_task_a_node"]
