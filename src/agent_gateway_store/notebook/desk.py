"""The desk of an approver in a notebook: what waits for a decision, with approve and deny."""

from __future__ import annotations

import inspect
from collections.abc import Coroutine
from html import escape
from typing import TYPE_CHECKING, Any

from agent_gateway_store import _text
from agent_gateway_store.results.cells import time_text
from agent_gateway_store.results.html import pretty_json, style

if TYPE_CHECKING:
    from agent_gateway_store.models.approval import ApprovalRequest

__all__ = ["Desk", "inbox", "shown"]

_ARGUMENT_CHARS = 20_000


def inbox(store: Any, *, approver: str, limit: int = 50, interval_s: float = 2.0, widgets: bool = True) -> Desk:
    """Show the approvals that wait, live, with buttons to approve and deny them and a note.

    Where widgets are off, the same output is a plain table with the calls to copy.

    Args:
        store: An open `GatewayStore` or `SyncGatewayStore`; bound by `for_org`, it shows that organisation.
        approver: Who decides, as written to the record.
        limit: The newest so many are shown.
        interval_s: Seconds between two looks at the store.
        widgets: False gives the plain table, which needs no extra.

    Raises:
        ValueError: `approver` is empty.
        MissingExtraError: The extra `notebook` is not installed.
    """
    if not approver:
        raise ValueError("approver must not be empty: it is written to the record of each decision.")
    desk: Desk
    if widgets:
        from agent_gateway_store.notebook.widget import widget_class

        desk = widget_class()(store, approver=approver, limit=limit, interval_s=interval_s)
    else:
        desk = Desk(store, approver=approver, limit=limit)
    if not desk.is_async:
        desk.refresh()
    return desk


class Desk:
    """What waits for a decision, and how to decide it.

    Attributes:
        waiting: The approvals that waited at the last `refresh`, newest first.
        is_async: True if its methods must be awaited.
    """

    waiting: list[ApprovalRequest]
    is_async: bool

    def __init__(self, store: Any, *, approver: str, limit: int) -> None:
        self._set_up(store, approver, limit)

    def _set_up(self, store: Any, approver: str, limit: int) -> None:
        self._store, self._approver, self._limit = store, approver, limit
        self.is_async = inspect.iscoroutinefunction(store.approvals.list_requests)
        self.waiting = []
        self._is_loaded = False

    def refresh(self) -> Any:
        """Look at the store again. With a `GatewayStore`: await it."""
        return self._run(self._load())

    def approve(self, approval_id: str, note: str = "") -> Any:
        """Approve, as `store.approvals.approve` does it, and look again. With a `GatewayStore`: await it."""
        return self._run(self._decide("approve", approval_id, note))

    def deny(self, approval_id: str, note: str = "") -> Any:
        """Deny, as `store.approvals.deny` does it, and look again. With a `GatewayStore`: await it."""
        return self._run(self._decide("deny", approval_id, note))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """A blocking store never suspends, so that its coroutine ends at the first step."""
        if self.is_async:
            return work
        try:
            work.send(None)
        except StopIteration as exc:
            return exc.value
        raise RuntimeError("A blocking store cannot wait.")

    async def _load(self) -> None:
        self.waiting = list(await _awaited(self._store.approvals.list_requests("PENDING", limit=self._limit)))
        self._is_loaded = True

    async def _decide(self, verb: str, approval_id: str, note: str) -> Any:
        decide = getattr(self._store.approvals, verb)
        result = await _awaited(decide(approval_id=approval_id, approver_id=self._approver, note=note, channel="inbox"))
        await self._load()
        return result

    def __repr__(self) -> str:
        lines = [f"{len(self.waiting)} waiting for {_text.escape(self._approver)}", *map(self._call, self.waiting)]
        return "\n".join(lines) if self._is_loaded else f"Desk of {_text.escape(self._approver)}: not loaded"

    def _call(self, request: ApprovalRequest, verb: str = "approve") -> str:
        wait, approver = "await " if self.is_async else "", _text.code_text(self._approver)
        return f'{wait}store.approvals.{verb}(approval_id="{request.approval_id}", approver_id={approver})'

    def _repr_html_(self) -> str:
        rows = "".join(map(self._row, self.waiting))
        head = "".join(
            f"<th>{name}</th>" for name in ("asked <small>UTC</small>", "caller", "call", "why", "to decide")
        )
        note = f"{len(self.waiting)} waiting" if self._is_loaded else "not loaded: await refresh()"
        who = f"Approvals for <b>{escape(_text.escape(self._approver))}</b>"
        table = f'<table class="ags-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        return (
            f'{style()}<div class="ags-view"><div class="ags-title">{who}</div>'
            f'<div class="ags-wide">{table}</div><p class="ags-foot">{note}</p></div>'
        )

    def _row(self, request: ApprovalRequest) -> str:
        text = shown(request)
        calls = "\n".join(self._call(request, verb) for verb in ("approve", "deny"))
        cells = (
            f'<td class="ags-line">{escape(time_text(request.created_at))}</td>',
            f"<td>{escape(text['caller'])}</td>",
            f"<td>{escape(text['call'])}<pre>{escape(text['arguments'])}</pre></td>",
            f"<td>{escape(text['why'])}</td>",
            f'<td class="ags-calls"><pre>{escape(calls)}</pre></td>',
        )
        return f"<tr>{''.join(cells)}</tr>"


async def _awaited(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def shown(request: ApprovalRequest) -> dict[str, str]:
    """Return an approval as text, with nothing in it that could reorder or hide what an approver reads.

    Arguments of more than 20,000 characters are cut, which is said with their length.
    """
    call = request.tool_call
    return {
        "id": str(request.approval_id),
        "caller": _text.escape(request.caller_id),
        "call": _text.call_name(call.server, call.tool),
        "arguments": pretty_json(call.arguments, most=_ARGUMENT_CHARS),
        "why": _text.escape(request.risk_explanation),
        "asked": request.created_at.isoformat(),
        "expires": request.expires_at.isoformat() if request.expires_at else "",
    }
