"""Pages of reports: a builder and a template each; they share one style sheet and one script."""
