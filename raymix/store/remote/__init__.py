"""Files by URL, local or on an object store: reading, writing, errors, mirrors, tails."""
