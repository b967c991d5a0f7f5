"""This machine: cores, memory, devices, versions."""
