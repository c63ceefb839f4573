"""Names of the files of a run folder that a person or a report reads."""

CONFIG_FILE = "config.yaml"
"""The resolved configuration; written before the first step."""

METRICS_FILE = "metrics.jsonl"
"""One object per step: {"step": 0, "reward/mean": 0.5, ...}."""

SAMPLES_FILE = "samples.jsonl"
"""A few samples per step."""

REPORT_FILE = "report.html"
"""Made from the other three."""
