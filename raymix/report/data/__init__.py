"""Run directories read and summarized; neither HTML nor matplotlib."""
