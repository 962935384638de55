"""One trainer for every objective: the optimizer step, its schedule, several processes, checkpoints and the log."""
