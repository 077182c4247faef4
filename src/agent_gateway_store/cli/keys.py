"""`gateway-store keys`: API keys. A plaintext is printed once, to standard output."""

from __future__ import annotations

from os import strerror
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store.cli.context import choose, duration, in_store, read_store
from agent_gateway_store.cli.errors import CommandError
from agent_gateway_store.cli.output import (
    JsonOption,
    complain,
    field_text,
    print_json,
    print_page,
    print_result,
    to_dict,
)

if TYPE_CHECKING:
    from agent_gateway_store.models.keys import IssuedKey

app = typer.Typer(name="keys", no_args_is_help=True, help="Issue, list, rotate and revoke API keys.")

CallerArgument = Annotated[str, typer.Argument(metavar="CALLER_ID", help="The caller that the API key is for.")]
_COLUMNS = {
    "caller_id": "caller",
    "org_id": "org",
    "key_id": "key id",
    "role": "role",
    "trust_level": "trust",
    "environment": "env",
    "is_active": "active",
    "last_used_at": "last used",
    "revoked_at": "revoked",
}


def print_issued(issued: IssuedKey, *, as_json: bool, **more: Any) -> None:
    """Print a new key: the plaintext alone on standard output, or JSON with it."""
    plaintext = issued.plaintext.get_secret_value()
    facts = to_dict(issued.api_key)
    if not as_json:
        level = field_text("trust_level", facts["trust_level"])
        complain(
            f"API key of {facts['caller_id']} (role {facts['role']}, trust level {level}, "
            f"environment {facts['environment']}). It cannot be shown again:"
        )
    try:
        if as_json:
            print_json({**facts, "plaintext": plaintext, **more})
        else:
            # Not through `say`, so that `KEY=$(gateway-store keys issue ...)` receives exactly the key.
            typer.echo(plaintext)
    except OSError as exc:
        raise CommandError(
            f"The API key of {facts['caller_id']} exists and nobody has seen it, because it could not be printed "
            f"({strerror(exc.errno or 0)}): `gateway-store keys rotate {facts['caller_id']} --overlap 0s` replaces it."
        ) from exc


@app.command()
def issue(
    ctx: typer.Context,
    caller_id: CallerArgument,
    role: Annotated[str, typer.Option(help="Role, as the gateway's policy names it.")],
    trust_level: Annotated[str, typer.Option(help="UNTRUSTED, LOW, MEDIUM, HIGH or ADMIN.")] = "LOW",
    environment: Annotated[str | None, typer.Option(help="Default: the setting ENVIRONMENT.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="For example 90d; default: never.")] = None,
    json: JsonOption = False,
) -> None:
    """Give a caller an API key and print it, once."""
    from agent_gateway_store.models.keys import TrustLevel

    for name, value in (("CALLER_ID", caller_id), ("--role", role), ("--environment", environment)):
        if value == "":
            raise typer.BadParameter(f"{name} must not be empty.")
    level = choose(TrustLevel, trust_level, "--trust-level")
    lifetime = None if expires_in is None else duration(expires_in, "--expires-in")
    if lifetime is not None and not lifetime:
        raise typer.BadParameter("--expires-in must be more than 0: an expired key identifies nobody.")
    issued = in_store(
        ctx,
        lambda store: store.keys.issue(
            caller_id, role=role, trust_level=level, environment=environment, expires_in=lifetime
        ),
    )
    print_issued(issued, as_json=json)


@app.command("list")
def list_keys(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    offset: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    json: JsonOption = False,
) -> None:
    """List API keys, newest first; no secret is among them."""
    page = read_store(ctx, lambda store: store.keys.list(limit=limit, offset=offset), as_json=json)
    print_page(
        page, columns=_COLUMNS, whole={"key_id"}, optional={"last_used_at", "org_id", "revoked_at"}, as_json=json
    )


@app.command()
def rotate(
    ctx: typer.Context,
    caller_id: CallerArgument,
    overlap: Annotated[str, typer.Option(help="How long the previous key is still accepted; 0s ends it now.")] = "24h",
    json: JsonOption = False,
) -> None:
    """Replace a caller's API key and print the new one, once."""
    both = duration(overlap, "--overlap")
    issued = in_store(ctx, lambda store: store.keys.rotate(caller_id, both))
    print_issued(issued, as_json=json)
    if not json and issued.previous_valid_until is not None:
        complain(f"The previous key is accepted until {issued.previous_valid_until:%Y-%m-%d %H:%M:%S} UTC.")


@app.command()
def revoke(ctx: typer.Context, caller_id: CallerArgument, json: JsonOption = False) -> None:
    """End a caller's API key, and the previous one, at once."""
    revoked = in_store(ctx, lambda store: store.keys.revoke(caller_id))
    print_result(to_dict(revoked), f"The API key of {caller_id} is revoked.", as_json=json)
