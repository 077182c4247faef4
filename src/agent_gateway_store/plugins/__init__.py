"""Bundled notifiers, each an entry point of this package, written as a stranger would write them."""
