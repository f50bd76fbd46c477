"""Programs over runs of the pipeline: compare, report, sweep, reproduce. May import `gpt2` and `stages`."""
