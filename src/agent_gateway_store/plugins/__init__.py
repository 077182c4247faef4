"""Bundled notifiers, each an entry point of this package, written as a third-party plugin would be."""
