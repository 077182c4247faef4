"""The plugin contract: markers, hookspecs, loading, isolated dispatch.

Import from the modules themselves: `markers` imports nothing but pluggy.
"""
