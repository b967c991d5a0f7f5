"""Carrying out a merge: plan, jobs on threads or Ray tasks, resume, final files."""
