"""API keys: issued once, verified fast, stored as bcrypt."""

from agent_gateway_store.keys.manager import KeyManager

__all__ = ["KeyManager"]
