"""How values become text and bytes: canonical JSON for hashes, and what any database can hold."""
