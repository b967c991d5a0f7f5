"""The host: resources, devices and versions.

Read in this order: `machine` (cores, memory, disk; resources of a Ray cluster), `device` (device,
threads and seeds of a rank), `environment` (versions, written beside a run's results).
"""
