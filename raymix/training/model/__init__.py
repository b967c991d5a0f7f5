"""The model of a run: built, placed on its ranks, its loss, optimizer and memory."""
