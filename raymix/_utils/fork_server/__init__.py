"""Processes that start with their modules loaded: forks of a process that has imported them.

Loading torch, transformers and Ray takes several seconds of a core, and a run starts half a dozen
Python processes that need them. `server` loads them once and forks; `setup_worker` is the script
that Ray's node manager starts in place of its own, and asks the server for a fork.
"""
