"""Jobs on a Ray cluster: ship a project, run a `raymix` command there, follow it from here.

`files` says which files of a project travel, `references` whether those that a recipe names are
among them, `package` packs them, `server` talks to the cluster's job server, `submission` puts
these together. Nothing here starts a cluster or joins one.
"""

from raymix.jobs.server import JobEnd, JobServer
from raymix.jobs.submission import COMMANDS, Submission, prepare_submission

__all__ = ["COMMANDS", "JobEnd", "JobServer", "Submission", "prepare_submission"]
