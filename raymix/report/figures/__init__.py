"""Figures of a report as SVG, drawn by matplotlib."""
