"""Stands for a library that is not installed: as JSON Schema's optional check of IRIs it takes seconds to import.

Each process that imports Altair or nbformat would compile its 39 grammars, and nothing here validates an IRI.
"""

raise ImportError
