"""`gateway-store seed`: a first caller, with what a policy file says of its role."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_gateway_store.cli.context import open_store, run, settings_of
from agent_gateway_store.cli.errors import CommandError
from agent_gateway_store.cli.keys import print_issued
from agent_gateway_store.cli.output import JsonOption, complain, print_json, record

if TYPE_CHECKING:
    from agent_gateway_store.models.keys import ApiKey, IssuedKey, TrustLevel
    from agent_gateway_store.store import GatewayStore

__all__ = ["CALLER", "ROLE", "seed"]

CALLER = "dev-agent"
ROLE = "developer"


def seed(
    ctx: typer.Context,
    policies: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="YAML policy file; without one, the role developer has trust level MEDIUM.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Create the caller dev-agent (role developer) and print its API key, once. Safe to repeat."""
    from agent_gateway_store.models.keys import TrustLevel

    settings = settings_of(ctx)
    levels = {ROLE: TrustLevel.MEDIUM} if policies is None else _levels(policies)

    async def work() -> tuple[IssuedKey | None, ApiKey]:
        async with open_store(ctx, settings=settings) as store:
            return await _first_key(store, levels[ROLE])

    issued, held = run(work())
    if policies is not None and not json:
        complain(f"Roles in {policies.name}: {', '.join(f'{name} {level.name}' for name, level in levels.items())}.")
    roles = {name: level.name for name, level in levels.items()}
    if issued is not None:
        print_issued(issued, as_json=json, created=True, roles=roles)
    elif json:
        print_json({**record(held), "created": False, "roles": roles})
    else:
        complain(f"{CALLER} already has an API key, which cannot be shown again: `gateway-store keys rotate {CALLER}`.")


async def _first_key(store: GatewayStore, level: TrustLevel) -> tuple[IssuedKey | None, ApiKey]:
    from agent_gateway_store.errors import ApiKeyExistsError

    try:
        issued = await store.keys.issue(CALLER, role=ROLE, trust_level=level)
    except ApiKeyExistsError:
        return None, await store.keys.get(CALLER)
    return issued, issued.api_key


def _levels(path: Path) -> dict[str, TrustLevel]:
    from agent_gateway_store.cli.policies import read_policies

    levels = read_policies(path)
    if ROLE not in levels:
        raise CommandError(f"{path.name} has no role {ROLE}, which {CALLER} is given: add it under `roles`.")
    return levels
