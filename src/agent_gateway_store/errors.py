"""Every error this package raises.

    GatewayStoreError
    ├── ApprovalError (also ValueError)
    │   ├── ApprovalNotFoundError
    │   ├── ApprovalAlreadyDecidedError
    │   ├── ApprovalAlreadyVotedError
    │   ├── ApprovalNotApprovedError
    │   ├── ApprovalExpiredError
    │   ├── ApprovalAlreadyUsedError
    │   ├── ApprovalMismatchError
    │   ├── SelfApprovalError
    │   ├── TooManyPendingError
    │   └── DecisionVetoedError
    ├── InvalidApiKeyError
    ├── ApiKeyNotFoundError
    ├── ApiKeyExistsError
    ├── InvalidUrlError (also ValueError)
    ├── StoreUnavailableError
    │   ├── AuditUnavailableError
    │   ├── UnreadableRowError
    │   └── TransactionConflictError
    ├── UnsupportedDatabaseError
    ├── SchemaOutOfDateError
    ├── StoreNotOpenError
    ├── SessionInUseError (also RuntimeError)
    ├── MissingExtraError (also ImportError)
    ├── PluginError
    ├── NotDeliveredError
    ├── SinkNotFoundError
    ├── AuditEventNotFoundError
    ├── HoldNotFoundError (also ValueError)
    ├── InvalidEvidenceError (also ValueError)
    ├── LogMismatchError
    ├── EventHeldError
    ├── ArchiveError
    └── InvalidCursorError (also ValueError)
        └── EventsPrunedError

Facts sit in attributes; the text is one sentence that ends with the next step. No error text holds a secret.
"""

from __future__ import annotations

import copyreg
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agent_gateway_store._text import code_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from uuid import UUID


class GatewayStoreError(Exception):
    """Root of every error this package raises on purpose. Every one can be pickled, with its attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # `Exception.__reduce__` calls the class with the message, but these constructors take other arguments.
        return copyreg.__newobj__, (type(self),), (self.args, self.__dict__)  # type: ignore[attr-defined]

    def __setstate__(self, state: tuple[tuple[Any, ...], dict[str, Any]]) -> None:  # type: ignore[override]
        args, facts = state
        super().__init__(*args)
        self.__dict__.update(facts)


class ApprovalError(GatewayStoreError, ValueError):
    """An approval cannot do what was asked of it.

    Attributes:
        approval_id: The approval concerned; None where none was found.
    """

    def __init__(self, message: str, *, approval_id: UUID | None = None) -> None:
        super().__init__(message)
        self.approval_id = approval_id


class ApprovalNotFoundError(ApprovalError):
    """No approval has this token or id. One of another organisation looks the same."""

    def __init__(self, message: str = "Approval not found: check the token or the approval id.") -> None:
        super().__init__(message)


class _ApprovalStateError(ApprovalError):
    """An approval whose status forbids what was asked.

    Attributes:
        status: Its status, as text.
        approver_id: Who decided; None where nobody did.
        decided_at: When (UTC); None where nobody did.
    """

    def __init__(
        self,
        message: str,
        *,
        approval_id: UUID | None = None,
        status: str | None = None,
        approver_id: str | None = None,
        decided_at: datetime | None = None,
    ) -> None:
        super().__init__(message, approval_id=approval_id)
        self.status, self.approver_id, self.decided_at = status, approver_id, decided_at


class ApprovalAlreadyDecidedError(_ApprovalStateError):
    """Somebody else decided first; the attributes say who and how."""


class ApprovalAlreadyVotedError(_ApprovalStateError):
    """This approver has voted on this approval before."""


class ApprovalNotApprovedError(_ApprovalStateError):
    """Only an approved approval can be consumed, and only a used one has an outcome."""


class ApprovalExpiredError(_ApprovalStateError):
    """The deadline to decide or to use has passed, by the database clock."""


class ApprovalAlreadyUsedError(_ApprovalStateError):
    """The approval has already released its one call."""


class ApprovalMismatchError(ApprovalError):
    """The caller, the tool call, the scope or the output is not the one that was approved."""


class SelfApprovalError(ApprovalError):
    """The caller of a tool call may not decide about it (setting ALLOW_SELF_APPROVAL)."""


class TooManyPendingError(ApprovalError):
    """As many approvals of one caller wait for a decision as APPROVAL_MAX_PENDING allows. Nothing was asked.

    Attributes:
        caller_id: Who asked.
        pending: How many wait.
    """

    def __init__(self, caller_id: str, pending: int) -> None:
        super().__init__(
            f"{pending} approvals of {code_text(caller_id)} wait for a decision already: decide or cancel some, or "
            "raise APPROVAL_MAX_PENDING."
        )
        self.caller_id = caller_id
        self.pending = pending


class DecisionVetoedError(ApprovalError):
    """A plugin refused the decision, or failed while it was asked, which counts as a refusal. Nothing was written.

    Attributes:
        plugin: Its name.
        reason: Why, on one line, secrets masked.
    """

    def __init__(
        self, message: str, *, approval_id: UUID | None = None, plugin: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(message, approval_id=approval_id)
        self.plugin = plugin
        self.reason = reason


class InvalidApiKeyError(GatewayStoreError):
    """The API key was not accepted. One error for every reason, so that none is given away."""

    def __init__(self, message: str = "Invalid API key: ask the operator for a new one.") -> None:
        super().__init__(message)


class ApiKeyNotFoundError(GatewayStoreError):
    """No API key belongs to this caller.

    Attributes:
        caller_id: The caller asked for.
    """

    def __init__(self, caller_id: str) -> None:
        super().__init__(f"No API key for caller {code_text(caller_id)}: issue one with `gateway-store keys issue`.")
        self.caller_id = caller_id


class ApiKeyExistsError(GatewayStoreError):
    """The caller already has an API key.

    Attributes:
        caller_id: The caller asked for.
    """

    def __init__(self, caller_id: str) -> None:
        super().__init__(f"{code_text(caller_id)} already has an API key: replace it by `gateway-store keys rotate`.")
        self.caller_id = caller_id


class InvalidUrlError(GatewayStoreError, ValueError):
    """A database or Redis URL that cannot be used."""


class StoreUnavailableError(GatewayStoreError):
    """The database (or a worker pool in front of it) cannot answer now. Trying again later may succeed."""


class UnreadableRowError(StoreUnavailableError):
    """A row was altered past the store so that it cannot be read; the error names it. Trying again does not help."""


class AuditUnavailableError(StoreUnavailableError):
    """AUDIT_MODE=strict: the event could not be recorded, so the call must not go through."""


class TransactionConflictError(StoreUnavailableError):
    """The database is well, but ended this transaction in favour of another one. Nothing of it was stored.

    The store has run its own transactions several times by then. In a session of the caller's it runs nothing again,
    since what the caller did there was rolled back as well.

    Attributes:
        sqlstate: "40001" (serialization failure) or "40P01" (deadlock).
        in_session: True if the transaction was the caller's.
    """

    def __init__(self, message: str, *, sqlstate: str, in_session: bool = False) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.in_session = in_session


class UnsupportedDatabaseError(GatewayStoreError):
    """The database cannot hold every text, because it was not created with the encoding UTF8.

    Attributes:
        encoding: The one it was created with.
    """

    def __init__(self, message: str, *, encoding: str) -> None:
        super().__init__(message)
        self.encoding = encoding


class SchemaOutOfDateError(GatewayStoreError):
    """The database schema is not the one that this version of the package needs.

    Attributes:
        current: Revision found; None for a database without our tables.
        expected: Revision this package needs.
    """

    def __init__(self, message: str, *, current: str | None = None, expected: str | None = None) -> None:
        super().__init__(message)
        self.current = current
        self.expected = expected


class StoreNotOpenError(GatewayStoreError):
    """The store is closed, was never opened, was opened in another process or event loop, or cannot be opened here."""


class SessionInUseError(GatewayStoreError, RuntimeError):
    """One session was used by several tasks at once."""

    def __init__(self, message: str = "Several tasks used one session: give each task a session of its own.") -> None:
        super().__init__(message)


class MissingExtraError(GatewayStoreError, ImportError):
    """An optional library is not installed.

    Attributes:
        extra: The extra that brings it.
    """

    def __init__(self, feature: str, *, extra: str) -> None:
        super().__init__(f"{feature} needs an optional library: pip install 'agent-gateway-store[{extra}]'.")
        self.extra = extra


@contextmanager
def needs_extra(feature: str, *, extra: str) -> Iterator[None]:
    """Raise MissingExtraError where the body cannot import a library, which `extra` brings."""
    try:
        yield
    except ImportError as exc:
        raise MissingExtraError(feature, extra=extra) from exc


class PluginError(GatewayStoreError):
    """A plugin is broken, blocked or misconfigured.

    Attributes:
        plugin: Its name.
    """

    def __init__(self, message: str, *, plugin: str) -> None:
        super().__init__(message)
        self.plugin = plugin


class NotDeliveredError(GatewayStoreError):
    """Raised by a notifier whose notice, or a sink whose events, did not arrive. Any other exception means the same.

    Attributes:
        retry_after_s: Seconds that the receiver asks to be left alone; None leaves it to the usual backoff.
        is_permanent: True gives the notice, or an event of the batch, up at once: trying again cannot help.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_permanent = is_permanent


class SinkNotFoundError(GatewayStoreError):
    """No plugin offers a sink of this name.

    Attributes:
        sink: The name asked for.
    """

    def __init__(self, sink: str, known: tuple[str, ...]) -> None:
        there = f"there are {', '.join(map(code_text, known))}" if known else "no sink is set up"
        super().__init__(
            f"No sink is named {code_text(sink)}, {there}: see `gateway-store plugins list` for what its plugin needs."
        )
        self.sink = sink


class InvalidCursorError(GatewayStoreError, ValueError):
    """A cursor that this listing did not hand out, or that has passed an audit event which is not in the database."""


class EventsPrunedError(InvalidCursorError):
    """The cursor stands behind events that were pruned since: going on from it would miss them.

    Attributes:
        archive: The folder to which they went, as the last prune named it; None: they were discarded.
    """

    def __init__(self, archive: str | None) -> None:
        place = f"read them in the archive {code_text(archive)}" if archive else "they were discarded"
        super().__init__(
            f"Events that this cursor has not passed were pruned: {place}. Then begin with a new cursor, or with "
            '"beginning".'
        )
        self.archive = archive


class InvalidEvidenceError(GatewayStoreError, ValueError):
    """A text that should be evidence or a checkpoint and cannot be read as one. It proves nothing."""


class LogMismatchError(GatewayStoreError):
    """The sealed log does not go on from a checkpoint of it that was kept: one of both was rewritten, or restored."""


class EventHeldError(GatewayStoreError):
    """A hold covers the event, or another one of its approval, so it is not erased.

    Attributes:
        holds: The names of the holds that cover it; empty in a store that is bound to one organisation.
    """

    def __init__(self, holds: tuple[str, ...]) -> None:
        by = f" by {', '.join(map(code_text, holds))}" if holds else ""
        super().__init__(
            f"The event, or another of its approval, is held{by}: `gateway-store retention release` lets it go."
        )
        self.holds = holds


class HoldNotFoundError(GatewayStoreError, ValueError):
    """No hold has this name.

    Attributes:
        name: The name asked for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no hold {code_text(name)}: `gateway-store retention holds` lists them.")
        self.name = name


class ArchiveError(GatewayStoreError):
    """A file of an archive is not what was written, or the folder is not the archive of this log.

    Attributes:
        file: The file, as the manifest names it.
    """

    def __init__(self, message: str, *, file: str) -> None:
        super().__init__(message)
        self.file = file


class AuditEventNotFoundError(GatewayStoreError):
    """No audit event has this request id. One of another organisation looks the same.

    Attributes:
        request_id: The id asked for.
    """

    def __init__(self, request_id: str) -> None:
        super().__init__(f"No audit event has the request id {code_text(request_id)}: `gateway-store audit search`.")
        self.request_id = request_id
