"""Starting a run: in this process, or on Ray.

Read in this order: `local` (training without Ray), `watch` (progress and Ctrl-C, for both),
`cluster` (starting or joining Ray), `driver` (actors and Ray Train), `worker` (the loop on each
worker), `placement` (context-parallel groups on nodes), `rendezvous` (process group on loopback).
"""
