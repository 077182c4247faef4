"""The inbox of an approver in a notebook: the approvals that wait, with approve and deny.

As a widget, the browser asks every few seconds for what waits, and sends what was clicked; the kernel answers. The
kernel alone knows who decides. The browser shows what comes from the data only as text.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from contextlib import suppress
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from agent_gateway_store import _text
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import GatewayStoreError, needs_extra
from agent_gateway_store.results.cells import time_text
from agent_gateway_store.results.html import pretty_json, style

if TYPE_CHECKING:
    from agent_gateway_store.models.approval import ApprovalRequest

# As many as a card shows of one text.
_ARGUMENT_CHARS = 20_000
_VERBS = {"approve": "Approved", "deny": "Denied"}
# Lines of the widget about the last decisions: they scroll out before they push the waiting approvals away.
_RESULTS = 6
# Milliseconds. A browser that asked more often would keep the kernel from running cells.
_LEAST_INTERVAL_MS = 200


def inbox(store: Any, *, approver: str, limit: int = 50, interval_s: float = 2.0, widgets: bool = True) -> Inbox:
    """Show the approvals that wait, live, with buttons to approve and deny them and a note.

    Where widgets are off, the same output is a plain table with the calls to copy.

    Args:
        store: An open `GatewayStore` or `SyncGatewayStore`; bound by `for_org`, it shows that organisation.
        approver: Who decides, as written to the record.
        limit: How many are shown, the newest first.
        interval_s: Seconds between two reads of the store.
        widgets: False gives the plain table, which needs no extra.

    Raises:
        ValueError: `approver` is blank.
        MissingExtraError: The extra `notebook` is not installed.
    """
    if _text.is_blank(approver):
        raise ValueError("approver must not be empty: it is written to the record of each decision.")
    shown: Inbox
    if widgets:
        shown = _widget_class()(store, approver=approver, limit=limit, interval_s=interval_s)
    else:
        shown = Inbox(store, approver=approver, limit=limit)
    if not shown.is_async:
        shown.refresh()
    return shown


class Inbox:
    """The approvals that wait for a decision, and how to decide them.

    Attributes:
        waiting: The approvals that waited at the last `refresh`, newest first.
        is_async: True if its methods must be awaited.
    """

    waiting: list[ApprovalRequest]
    is_async: bool

    def __init__(self, store: Any, *, approver: str, limit: int) -> None:
        self._store, self._approver, self._limit = store, approver, limit
        self.is_async = inspect.iscoroutinefunction(store.approvals.list_requests)
        self.waiting = []
        self._is_loaded = False

    def refresh(self) -> Any:
        """Read the store again. With a `GatewayStore`: await it."""
        return self._run(self._load())

    def approve(self, approval_id: str, note: str = "") -> Any:
        """Approve, as `store.approvals.approve` does it, and read the store again. With a `GatewayStore`: await it."""
        return self._run(self._decide("approve", approval_id, note))

    def deny(self, approval_id: str, note: str = "") -> Any:
        """Deny, as `store.approvals.deny` does it, and read the store again. With a `GatewayStore`: await it."""
        return self._run(self._decide("deny", approval_id, note))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self.is_async:
            return work
        # With a blocking store nothing suspends, so that the coroutine ends at its first step.
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
        approver = _text.escape(self._approver)
        if not self._is_loaded:
            return f"Inbox of {approver}: not loaded"
        return "\n".join([f"{len(self.waiting)} waiting for {approver}", *map(self._call, self.waiting)])

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
        text = approval_texts(request)
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


def approval_texts(request: ApprovalRequest) -> dict[str, str]:
    """Return an approval as text, with nothing in it that could reorder or hide what an approver reads."""
    call = request.tool_call
    what = "" if request.scope == "EXECUTION" else "Releases the output of the call, which has run. "
    if call.is_cut:
        what = f"{_text.CUT_CALL} {what}"
    return {
        "id": str(request.approval_id),
        "caller": _text.escape(request.caller_id),
        "call": _text.call_name(call.server, call.tool),
        "arguments": pretty_json(call.arguments, most=_ARGUMENT_CHARS),
        "why": what + _text.escape(request.risk_explanation),
        "asked": request.created_at.isoformat(),
        "expires": request.expires_at.isoformat() if request.expires_at else "",
    }


@cache
def _widget_class() -> type[Any]:
    """Return the inbox as an anywidget, or raise MissingExtraError."""
    with needs_extra("inbox()", extra="notebook"):
        import anywidget
        import traitlets
    here = files(__package__)
    css = [files("agent_gateway_store.results").joinpath("view.css"), here.joinpath("inbox.css")]

    class InboxWidget(Inbox, anywidget.AnyWidget):
        """An inbox that a browser shows.

        Attributes:
            items: The approvals that wait, as text.
            said: A line about each of the last decisions, newest first.
            looked_at: When the store was read last, ISO 8601.
        """

        _esm = here.joinpath("inbox.js").read_text(encoding="utf-8")
        _css = "\n".join(path.read_text(encoding="utf-8") for path in css)
        approver = traitlets.Unicode(read_only=True).tag(sync=True)
        items: Any = traitlets.List().tag(sync=True)
        said: Any = traitlets.List().tag(sync=True)
        looked_at = traitlets.Unicode().tag(sync=True)
        interval_ms = traitlets.Int().tag(sync=True)

        def __init__(self, store: Any, *, approver: str, limit: int, interval_s: float) -> None:
            Inbox.__init__(self, store, approver=approver, limit=limit)
            self._tasks: set[Any] = set()
            self._owner: asyncio.AbstractEventLoop | None = None
            with suppress(RuntimeError):
                self._owner = asyncio.get_running_loop()
            anywidget.AnyWidget.__init__(self, interval_ms=max(_LEAST_INTERVAL_MS, round(interval_s * 1000)))
            self.set_trait("approver", _text.escape(approver))
            self.on_msg(self._receive)

        async def _load(self) -> None:
            await super()._load()
            self.items = [approval_texts(request) for request in self.waiting]
            self.looked_at = utc_now().isoformat()

        def _receive(self, _widget: Any, content: Any, _buffers: Any) -> None:
            work = self._answer(content if isinstance(content, dict) else {})
            if not self.is_async:
                self._run(work)
                return
            # JupyterLab delivers what a widget sends in another thread (a subshell), where no store was opened.
            running = asyncio.get_running_loop()
            owner = self._owner or running
            task = running.create_task(work) if owner is running else asyncio.run_coroutine_threadsafe(work, owner)
            # A loop holds its tasks weakly: one that nobody keeps may vanish before it is done.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        async def _answer(self, content: dict[str, Any]) -> None:
            verb, approval_id = content.get("do"), str(content.get("approval_id", ""))
            call = next((item["call"] for item in self.items if item["id"] == approval_id), approval_id)
            try:
                if verb in _VERBS:
                    await self._decide(verb, approval_id, str(content.get("note", "")))
                    self._say(f"{_VERBS[verb]}: {call}", "good" if verb == "approve" else "bad")
                else:
                    await self._load()
            except GatewayStoreError as exc:
                self._say(f"{call}: {exc}" if verb in _VERBS else str(exc), "wait")
                if verb in _VERBS:
                    await self._answer({"do": "refresh"})
            finally:
                # The browser keeps the buttons of this approval disabled until it receives this.
                self.send({"answered": verb, "approval_id": approval_id})

        def _say(self, text: str, tone: str) -> None:
            new = {"text": _text.escape(text), "tone": tone, "at": utc_now().strftime("%H:%M:%S")}
            self.said = [new, *self.said][:_RESULTS]

        def _repr_mimebundle_(self, **options: Any) -> Any:
            found = anywidget.AnyWidget._repr_mimebundle_(self, **options)
            data, metadata = found if isinstance(found, tuple) else (found or {}, {})
            return {**data, "text/plain": Inbox.__repr__(self), "text/html": self._repr_html_()}, metadata

    return InboxWidget
