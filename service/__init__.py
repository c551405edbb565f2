"""The HTTP service around a detector: one model thread a process, many request threads, calibrated verdicts as JSON."""
