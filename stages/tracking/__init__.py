"""Tracking with MLflow that can neither delay nor break a stage; `protocol` describes how."""

from stages.tracking.description import datasets, git_tags
from stages.tracking.handover import hand_over_model
from stages.tracking.protocol import RunIds, metrics_event
from stages.tracking.run import Run, new_run_ids, read_run_ids, start_run

__all__ = [
    "Run",
    "RunIds",
    "datasets",
    "git_tags",
    "hand_over_model",
    "metrics_event",
    "new_run_ids",
    "read_run_ids",
    "start_run",
]
