"""`python -m agent_gateway_store.cli` is `gateway-store`."""

from agent_gateway_store.cli import main

main()
