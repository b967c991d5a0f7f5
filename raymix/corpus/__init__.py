"""See design notes in the modules of this package."""
