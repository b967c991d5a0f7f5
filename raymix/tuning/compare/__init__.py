"""`raymix compare`: one recipe under several mixers and seeds, with paired statistics."""
