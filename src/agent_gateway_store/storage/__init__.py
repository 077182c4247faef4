"""Engines, sessions, Redis and migrations. Knows no business rule."""
