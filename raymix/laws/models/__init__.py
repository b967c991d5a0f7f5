"""The laws themselves: closed formulas, regressions, a Gaussian process, and `auto`."""
