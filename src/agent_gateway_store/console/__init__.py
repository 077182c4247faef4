"""The console: pages in a browser to decide approvals and search the audit log, for people who hold an API key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_gateway_store.errors import MissingExtraError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from agent_gateway_store.store import GatewayStore

__all__ = ["create_console"]


def create_console(store: GatewayStore) -> ASGIApp:
    """Return the console as an ASGI application, to serve or to mount under any path.

    Served by itself, it opens the store when it starts, again once a database that was away is back, and closes it at
    the end. Mounted in another application, it takes the store as it is: the host opens it.

    Args:
        store: Its settings `console_...` are in force. Each person sees the organisation of the own key and no other.

    Raises:
        MissingExtraError: The extra `console` is not installed.
    """
    try:
        from agent_gateway_store.console.app import build
    except ModuleNotFoundError as exc:
        raise MissingExtraError("The console", extra="console") from exc
    return build(store)
