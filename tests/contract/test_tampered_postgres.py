"""Whoever owns a PostgreSQL database changes its tables, rules and triggers: `verify` reads nothing from them."""

from __future__ import annotations

from uuid import uuid4

import pytest
from sqlalchemy import make_url

from agent_gateway_store import GatewayStore
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.models.evidence import FindingKind
from tampering import SETTINGS, run_as_owner, verified_after

pytestmark = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)

FUNCTION = "CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$"
SAYS = """-- It's run after each INSERT INTO audit_events.
BEGIN /* UPDATE audit_events */ RAISE LOG 'insert into audit_events: %', NEW.id;
PERFORM pg_notify('siem', E'don\\'t DELETE FROM audit_events');"""
# The type `json` keeps a name that stands twice.
TWICE = """'{"path": "evil", "path": "x"}'::json"""


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            f"ALTER TABLE audit_events ALTER sanitized_args TYPE json USING {TWICE}",
            "audit_events lacks the column sanitized_args jsonb",
        ),
        (
            "ALTER TABLE audit_events DROP trace_id, ADD trace_id text GENERATED ALWAYS AS ('x') STORED",
            "audit_events lacks the column trace_id text, or computes it",
        ),
        ("ALTER TABLE audit_checkpoints ALTER size TYPE text", "audit_checkpoints lacks the column size int8"),
        ("ALTER TABLE audit_events SET UNLOGGED", "audit_events is UNLOGGED"),
        ("CREATE TABLE kid () INHERITS (audit_leaves)", "audit_leaves has tables that inherit from it"),
        (
            "CREATE RULE lost AS ON INSERT TO audit_events WHERE NEW.caller_id = 'evil' DO INSTEAD NOTHING",
            "audit_events has a rule that replaces INSERT",
        ),
        (
            f"{FUNCTION}; CREATE TRIGGER lose BEFORE INSERT ON audit_leaves FOR EACH ROW EXECUTE FUNCTION theirs()",
            "audit_leaves has the trigger lose that runs before INSERT",
        ),
    ],
)
async def test_what_can_show_something_else_is_seen(own_database_url: str, statement: str, said: str) -> None:
    """Nothing is read from it, and one finding says why."""
    found = await verified_after(own_database_url, statement)
    assert [(each.kind, said in each.text) for each in found.findings] == [(FindingKind.ALTERED, True)]


async def test_a_trigger_or_rule_that_cannot_drop_rows_is_no_finding(own_database_url: str) -> None:
    """Somebody else may take events to another place, or make a table append-only in their way."""
    found = await verified_after(
        own_database_url,
        FUNCTION.replace("BEGIN", SAYS),
        "CREATE TRIGGER theirs AFTER INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION theirs()",
        "CREATE TRIGGER theirs BEFORE UPDATE ON audit_leaves FOR EACH ROW EXECUTE FUNCTION theirs()",
        "CREATE RULE kept AS ON DELETE TO audit_events DO INSTEAD NOTHING",
    )
    assert (found.ok, ["which is not the store's" in each for each in found.remarks]) == (True, [True] * 3)


@pytest.mark.parametrize(
    ("state", "setting", "is_found"),
    [("ALWAYS", "origin", True), ("REPLICA", "origin", False), ("REPLICA", "Replica", True)],
)
async def test_a_trigger_counts_where_it_fires_for_writers(
    own_database_url: str, state: str, setting: str, is_found: bool
) -> None:
    """One for replicas alone lets every event of a gateway pass, unless writers are set to count as such."""
    name = make_url(own_database_url).database
    found = await verified_after(
        own_database_url,
        FUNCTION,
        f"ALTER DATABASE \"{name}\" SET session_replication_role = '{setting}'",
        "CREATE TRIGGER theirs BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION theirs()",
        f"ALTER TABLE audit_events ENABLE {state} TRIGGER theirs",
    )
    assert found.ok is not is_found
    assert any("sessions fire no triggers" in each for each in found.remarks) is (setting == "Replica")


@pytest.mark.parametrize("name", ["audit_events", "audit_leaves"])
async def test_a_policy_that_hides_rows_is_refused(own_database_url: str, name: str) -> None:
    """In a sentence that says what to do; a role to which no policy applies reads on."""
    role = f"auditor_{uuid4().hex}"
    hidden = [
        f"CREATE ROLE {role} LOGIN",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
        f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY shown ON {name} FOR SELECT TO {role} USING (true)",
    ]
    assert (await verified_after(own_database_url, *hidden)).ok
    try:
        theirs = make_url(own_database_url).set(username=role).render_as_string(hide_password=False)
        async with GatewayStore(theirs, redis_url="", settings=SETTINGS) as store:
            with pytest.raises(StoreUnavailableError, match=r"row-level security.*run it as a role to which no"):
                await store.evidence.verify()
    finally:
        await run_as_owner(own_database_url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
