"""Measurements of finished models: bits per byte, tasks, baselines beside them, and the report that people read."""
