"""For gateways on FastAPI: one store for the application, its callers, and the approvals over HTTP. Extra: `fastapi`.

Every dependency can be replaced in tests by `app.dependency_overrides`, under `get_store`, `get_caller` and
`get_caller_store`.
"""

from __future__ import annotations

from agent_gateway_store.errors import MissingExtraError

# Imported here first, so that the error where it is missing names the extra.
try:
    import fastapi  # noqa: F401
except ImportError as exc:
    raise MissingExtraError("agent_gateway_store.integrations.fastapi", extra="fastapi") from exc

from agent_gateway_store.integrations.fastapi.approvals import ApprovalView, Approver, DecisionView, approvals_router
from agent_gateway_store.integrations.fastapi.dependencies import (
    CallerDep,
    CallerStoreDep,
    StoreDep,
    get_caller,
    get_caller_store,
    get_store,
    lifespan,
)
from agent_gateway_store.integrations.fastapi.exception_handlers import http_exception_of, install_error_handlers

__all__ = [
    "ApprovalView",
    "Approver",
    "CallerDep",
    "CallerStoreDep",
    "DecisionView",
    "StoreDep",
    "approvals_router",
    "get_caller",
    "get_caller_store",
    "get_store",
    "http_exception_of",
    "install_error_handlers",
    "lifespan",
]
