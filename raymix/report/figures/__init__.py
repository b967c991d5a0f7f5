"""Charts of reports: matplotlib figures as inline SVG whose series a page can toggle."""
