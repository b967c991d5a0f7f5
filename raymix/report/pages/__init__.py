"""Pages of a report as HTML."""
