"""The hooks a plugin can implement, and the shape of a notifier."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from agent_gateway_store.hooks import hookspec

if TYPE_CHECKING:
    from uuid import UUID

    from pydantic_settings import BaseSettings
    from typer import Typer

    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.models.evidence import Checkpoint
    from agent_gateway_store.models.values import Notice, PendingApproval
    from agent_gateway_store.settings import StoreSettings


@runtime_checkable
class Notifier(Protocol):
    """Notifies people or systems about approvals.

    Its methods run in their own thread and event loop, and are cancelled after `PLUGIN_TIMEOUT_SECONDS`. Raising means
    "not delivered": the same notice is delivered again later. So a notice can arrive more than once; its `delivery_id`
    stays the same. Several notices may be under way at once.

    Attributes:
        name: Unique among all notifiers; printable, at most 100 characters.
    """

    @property
    def name(self) -> str: ...

    async def notify_pending(self, notice: Notice) -> None:
        """Deliver a notice that an approval waits for a decision.

        Args:
            notice: What is asked, by whom, until when. A copy.
        """

    async def notify_decision(self, notice: Notice) -> None:
        """Deliver a notice that an approval was decided or cancelled, or has expired.

        Args:
            notice: The same approval, with status, approver and time of the decision. A copy.
        """


@hookspec
def gateway_store_register_notifiers(settings: StoreSettings) -> Sequence[Notifier] | None:
    """Contribute notifiers. Called once for each store that opens, in a thread; must not be async.

    Each notifier is checked apart from the others: one of the wrong shape, or whose name is taken, is left out and
    recorded.

    Args:
        settings: Settings of the store. Holds secrets: do not log it.

    Returns:
        A list of notifiers; None or an empty list for none, for example because nothing is configured.
    """


@runtime_checkable
class Sink(Protocol):
    """Takes the events of the audit log, in the order of their commits: a SIEM, a data lake, a file.

    `send` runs in its own thread and event loop, and is cancelled after `PLUGIN_TIMEOUT_SECONDS`. One process at a time
    ships to a sink, one batch after the other; a batch whose acknowledgement was not recorded comes again, so that an
    event can come more than once. Its `org_id` and `request_id` name it.

    Attributes:
        name: Unique among all sinks, and the same in every process: what was shipped is kept under it. Printable, at
            most 100 characters.
    """

    @property
    def name(self) -> str: ...

    async def send(self, events: Sequence[AuditEvent]) -> None:
        """Take a batch; returning means that it is safe, and it is not sent again.

        `event.model_dump_json()` is the line that `audit export` writes.

        Args:
            events: At least one, in order. Copies.

        Raises:
            NotDeliveredError: It was not taken, and is sent again later; with `is_permanent`: an event of it is refused
                for good, and the batch is divided until that one is alone, which becomes a dead letter. Any other
                exception means that it was not taken.
        """


@hookspec
def gateway_store_register_sinks(settings: StoreSettings) -> Sequence[Sink] | None:
    """Contribute sinks for `store.audit.ship`. Called when a sink is asked for, in a thread; must not be async.

    Each sink is checked apart from the others: one of the wrong shape, or whose name is taken, is left out and
    recorded.

    Args:
        settings: Settings of the store. Holds secrets: do not log it.

    Returns:
        A list of sinks; None or an empty list for none, for example because nothing is configured.
    """


@hookspec
def gateway_store_approval_event(notice: Notice) -> Awaitable[None] | None:
    """Receive every notice, after the change it is about was committed.

    May be sync or async. Runs in the plugin's own thread and event loop, within `PLUGIN_TIMEOUT_SECONDS`. It is not
    repeated, and a process that dies after its commit does not make the call. Use a notifier for what must arrive.

    Args:
        notice: What happened. A copy.

    Returns:
        Ignored.
    """


@hookspec
def gateway_store_veto_decision(
    request: PendingApproval,
    decision: Literal["APPROVED", "DENIED"],
    approver_id: str,
    note: str,
    channel: str,
) -> str | Awaitable[str | None] | None:
    """Object to a decision before it is made. One objection refuses it: `DecisionVetoedError`, and nothing is written.

    May be sync or async. Called for each vote to approve and for each denial, whichever way it comes (code, command
    line, Slack, ...); not for cancelling, so that a call can always be withdrawn. Runs before the transaction, so that
    it holds no lock, in the plugin's own thread, within `PLUGIN_TIMEOUT_SECONDS`. A plugin that raises, takes longer,
    or returns anything but text or None refuses as well. `ApprovalManager(session)` on its own uses no plugins.

    Args:
        request: The approval, its arguments sanitised. A copy.
        decision: `APPROVED` or `DENIED`.
        approver_id: The approver who decides.
        note: What the approver wrote.
        channel: How the decision came: `api`, `cli`, `slack`, ...

    Returns:
        None or "" for no objection, else the reason in a few words, which the approver reads.
    """


@hookspec
def gateway_store_before_audit_write(event: AuditEvent) -> AuditEvent | Awaitable[AuditEvent | None] | None:
    """Enrich or redact an event before it is stored, also before it waits in the spool.

    May be sync or async. Called for every event that goes through `store.audit` (not `AuditLogger(session)`), in the
    plugin's own thread, within `PLUGIN_TIMEOUT_SECONDS`; by `record`, while the caller's transaction is open. Several
    events may be under way at once. Of several plugins each receives the result of the one before it. The same event
    must give the same result each time, or a repeated write is not a DUPLICATE.

    Changed may be `sanitized_args`, `extra`, `risk_labels`, `risk_score`, `matched_policy_rule`, `policy_version`,
    `output_policy_rationale`, `llm_explanation`, `deterministic_rationale`, `trace_id`, `session_id` and
    `parent_request_id`; to `redaction_flags` can be added. All other fields, such as the caller, the tool, the time,
    the organisation and the decision, must stay as they are.

    If a plugin raises, takes too long, or changes another field, what it should have redacted must not be stored: the
    event is stored without its texts, arguments and `extra`, each marked `[WITHHELD]` and flagged `PLUGIN_FAILED`
    (`store.audit.counters.withheld`). After a timeout the plugin is not called for as long again, and events are
    withheld until then. A plugin that only enriches should catch its own errors.

    Args:
        event: The event as it would be stored. A copy, which may be changed.

    Returns:
        The event to store, or None for no change. Changing `event` and returning None changes nothing.
    """


@hookspec
def gateway_store_audit_written(events: Sequence[AuditEvent]) -> Awaitable[None] | None:
    """Receive events after their commit, in batches, in the order of the commits.

    May be sync or async. Called in the background, in the plugin's own thread, within `PLUGIN_TIMEOUT_SECONDS` for a
    batch; no write waits for it. It is not repeated: events beyond 10,000 that a slow plugin leaves waiting, those that
    a failing plugin received, and those that waited when the process died are not delivered (and counted:
    `store.audit.counters.unnotified`). A reader that must not miss an event uses `store.audit.follow`.

    Args:
        events: Up to 500, scrubbed as they are stored; an event under a used request id has that id, and not the
            derived one. Without duplicates, but with events that waited in the spool. Copies.

    Returns:
        Ignored.
    """


@hookspec
def gateway_store_checkpoint(checkpoint: Checkpoint) -> Awaitable[None] | None:
    """Receive each new checkpoint of the sealed log, to keep it where the database's owner cannot change it.

    May be sync or async. Called after the checkpoint was committed, by the process that made it, in the plugin's own
    thread, within `PLUGIN_TIMEOUT_SECONDS`. It is not repeated: a checkpoint that a plugin did not keep is followed by
    larger ones, each of which vouches for everything before it.

    Args:
        checkpoint: Its `note` is what to keep, byte by byte.

    Returns:
        Ignored.
    """


@hookspec
def gateway_store_register_commands(app: Typer) -> None:
    """Add commands to `gateway-store`. Called in a thread when the command line needs to know them; must not be async.

    A command or group whose name is taken is left out, with a line on standard error; so are all commands of a plugin
    that raises here. A command opens the store of the global options by
    `agent_gateway_store.cli.context.open_store(ctx)`.

    Args:
        app: An empty Typer application: `@app.command("export-tickets")`, or `app.add_typer(group, name="tickets")`.

    Returns:
        Ignored.
    """


@hookspec
def gateway_store_plugin_settings() -> type[BaseSettings] | None:
    """Declare the settings that the plugin reads, for `gateway-store plugins list` and `plugins check`.

    Must not be async. The plugin itself builds the model, usually in `gateway_store_register_notifiers`.

    Returns:
        A class of `pydantic_settings.BaseSettings` with an `env_prefix`, which sets its variables apart from others;
        None if there are none.
    """


@hookspec
def gateway_store_map_approver(
    channel: str, user_id: str, user_name: str, approval_id: UUID
) -> str | Awaitable[str | None] | None:
    """Return the approver id of a user who clicked in a chat. Without an answer of any plugin the click is refused.

    May be sync or async; runs in the plugin's own thread, within a second and a half. The first plugin with an answer
    counts, in the order of loading; one before it that raises, takes longer, or answers with anything but text or None
    refuses the click.

    Args:
        channel: Where the click came from: `slack`.
        user_id: The chat's id of the user, as in `U024BE7LH`; proven by the chat's signature.
        user_name: The user's name in the chat, chosen by the user: it proves nothing.
        approval_id: What is to be decided.

    Returns:
        The approver id that is written to the record, or None if the plugin does not know the user.
    """
