"""Source files: sources (globs to files), parts (files to slices), readers."""
