"""Run the gateway: `python -m fastapi_gateway`."""

from __future__ import annotations

import logging

import uvicorn
from pydantic import ValidationError

from agent_gateway_store.errors import InvalidUrlError
from fastapi_gateway.app import create_app
from fastapi_gateway.config import GatewaySettings
from fastapi_gateway.policy import PolicyError


def main() -> None:
    """Start the server; a bad policy file or setting ends it with one sentence."""
    # Without a handler on the root logger the store's own messages (lost events, approvals asked) are seen nowhere.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = GatewaySettings()
        app = create_app(settings)
    except ValidationError as exc:
        prefix = "GATEWAY_" if exc.title == GatewaySettings.__name__ else ""
        names = ", ".join(prefix + str(error["loc"][0]).upper() for error in exc.errors())
        raise SystemExit(f"The gateway did not start: check the setting {names}.") from None
    except (PolicyError, InvalidUrlError) as exc:
        raise SystemExit(f"The gateway did not start: {exc}") from None
    uvicorn.run(app, host=settings.host, port=settings.port, server_header=False)


if __name__ == "__main__":
    main()
