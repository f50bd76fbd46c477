"""Tracking with MLflow that can neither delay nor break a stage; `protocol` describes how."""

from stages.tracking.protocol import RunIds, metrics_event
from stages.tracking.run import Run, git_tags, new_run_ids, read_run_ids, start_run

__all__ = ["Run", "RunIds", "git_tags", "metrics_event", "new_run_ids", "read_run_ids", "start_run"]
