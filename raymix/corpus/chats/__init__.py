"""Conversations: from messages of any common form to text whose answers are known.

In reading order: `messages` (forms of messages), `template` (rendering, and where the answers are),
`special_tokens` (special tokens written out in contents), `saved` (the template of a corpus).
"""
