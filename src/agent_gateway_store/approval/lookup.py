"""The part of `ApprovalManager` that only reads lists and histories."""

from __future__ import annotations

from typing import Any, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement

from agent_gateway_store.approval import listing
from agent_gateway_store.approval.rows import Name, require_text, standing
from agent_gateway_store.approval.searching import ApprovalFilters, history, narrowed
from agent_gateway_store.approval.transitions import requests
from agent_gateway_store.errors import ApprovalNotFoundError
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.results import Page
from agent_gateway_store.storage.database import Transactions, dialect_of
from agent_gateway_store.storage.filters import require_between

__all__ = ["ApprovalLookup"]


class ApprovalLookup:
    """Finds approvals and tells their story."""

    _transactions: Transactions
    _org_id: str | None

    async def list_requests(
        self, status: ApprovalStatus | str | None = None, limit: int = 50, cursor: str | None = None
    ) -> Page[ApprovalRequest]:
        """Return approvals, newest first, ties broken by id. `next_cursor` leads on; new approvals do not move it.

        Args:
            status: Only these, as a reader sees them (EXPIRED from the deadline on). None: all.
            limit: At most so many, 1 to 2^31 - 1.
            cursor: `next_cursor` of the page before.

        Raises:
            InvalidCursorError: The cursor did not come from this listing.
            ValueError: There is no such status, or `limit` is out of range.
        """
        return await self.search(limit=limit, cursor=cursor, status=status)

    async def search(
        self, *, limit: int = 50, cursor: str | None = None, **filters: Unpack[ApprovalFilters]
    ) -> Page[ApprovalRequest]:
        """Return approvals that match every filter (see `ApprovalFilters`), newest first, ties broken by id.

        `next_cursor` leads on to older ones; approvals that are asked for meanwhile do not move it.

        Args:
            limit: At most so many, 1 to 2^31 - 1.
            cursor: `next_cursor` of the page before; the filters must be the same.
            filters: caller_id, request_id, org_id, tool, server, status, approver_id, since, until, text.

        Raises:
            InvalidCursorError: The cursor did not come from this search.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such status or time, or `limit` is out of range.
        """
        require_between("limit", limit, 1, hint="for more approvals, go on with next_cursor")
        async with self._transactions.read() as connection:
            found, scope = narrowed(filters, dialect_of(connection), self._org_id)
            return await listing.page(connection, *self._mine(), *found, scope=scope, limit=limit, cursor=cursor)

    async def get(self, *, approval_id: UUID | str) -> ApprovalRequest:
        """Return the approval of this id, without its token.

        Raises:
            ApprovalNotFoundError: There is none.
        """
        name = self._by_id(approval_id)
        async with self._transactions.connection("read") as connection:
            found = await standing(connection, name)
        if found is None:
            raise ApprovalNotFoundError
        return found

    async def history(self, approval_id: UUID | str) -> Page[dict[str, Any]]:
        """Return what happened to an approval, in the order of time.

        Each row has `at`, `event` (asked, vote, decided, expired, used, outcome, notice), `by` (caller, approver or
        notifier), `status`, `note` and `channel`. A used approval without an outcome shows it as unknown.

        Raises:
            ApprovalNotFoundError: There is no such approval.
        """
        name = self._by_id(approval_id)
        async with self._transactions.read() as connection:
            found = await standing(connection, name)
            if found is None:
                raise ApprovalNotFoundError
            return await history(connection, found)

    def _name(self, token: str | None, approval_id: UUID | str | None) -> Name:
        if (token is None) == (approval_id is None):
            raise TypeError("Name the approval either by its token or by approval_id.")
        if token is not None:
            require_text(token)
            return Name(token, None, self._org_id)
        return self._by_id(approval_id)

    def _by_id(self, approval_id: Any) -> Name:
        try:
            return Name(None, approval_id if isinstance(approval_id, UUID) else UUID(approval_id), self._org_id)
        except (ValueError, AttributeError, TypeError):
            raise ApprovalNotFoundError from None

    def _mine(self) -> tuple[ColumnElement[bool], ...]:
        return () if self._org_id is None else (requests.c.org_id == self._org_id,)
