"""The run directory: files, locks, remote copy, checkpoints, metrics and progress.

Read in this order: `rundir` (paths, local lock, cutting metrics at a resume), `checkpoint`
(format and reading) with `checkpoint_writer`, `recorder` (metrics of a step, with `event_file` for
TensorBoard and `gauges` for Prometheus), `progress` (console output, read from the metrics),
`control` (the mixture of a run in work), `remote_run` and `heartbeat_lock` (runs stored at a URL),
`fallback` (going back to earlier checkpoints), `stalls` (steps that take too long).
"""
