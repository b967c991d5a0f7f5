"""Data of reports: run directories parsed and summarized; neither HTML nor matplotlib."""
