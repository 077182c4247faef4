"""The plugin contract: markers, hookspecs, loading, isolated dispatch.

Import from the modules themselves: `markers` loads nothing but pluggy.
"""
