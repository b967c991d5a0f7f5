"""Execution of a merge: plan, jobs on threads or as Ray tasks, resume, final files.

Read in this order: `settings` (method and options of a parameter), `plan` (all parameters, checked
before anything is written), `work` (one job) with `measure`, `engine` (`merge` itself, threads),
`fanout` (Ray tasks, the only module here that imports Ray), `finish` (configuration, tokenizer,
model card, report).
"""
