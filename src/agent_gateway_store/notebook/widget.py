"""The desk as a widget: the browser asks for news every few seconds and sends what was clicked, the kernel answers.

Who decides is fixed in the kernel. The browser sets what comes from the data only as text.
"""

from __future__ import annotations

import asyncio
from functools import cache
from importlib.resources import files
from typing import Any

from agent_gateway_store import _text
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import GatewayStoreError, MissingExtraError
from agent_gateway_store.notebook.desk import Desk, shown

__all__ = ["widget_class"]

_DONE = {"approve": "Approved", "deny": "Denied"}
_ALREADY_SAID = 6


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@cache
def widget_class() -> type[Any]:
    """Return the desk as an anywidget.

    Raises:
        MissingExtraError: anywidget is not installed.
    """
    try:
        import anywidget
        import traitlets
    except ImportError as exc:
        raise MissingExtraError("inbox()", extra="notebook") from exc
    here = files(__package__)
    css = [files("agent_gateway_store.results").joinpath("view.css"), here.joinpath("inbox.css")]

    class Inbox(Desk, anywidget.AnyWidget):
        """A desk that a browser shows.

        Attributes:
            items: What waits, as text.
            said: What became of the last decisions, newest first.
            looked_at: When the store was looked at last, ISO 8601.
        """

        _esm = here.joinpath("inbox.js").read_text(encoding="utf-8")
        _css = "\n".join(path.read_text(encoding="utf-8") for path in css)
        approver = traitlets.Unicode(read_only=True).tag(sync=True)
        items: Any = traitlets.List().tag(sync=True)
        said: Any = traitlets.List().tag(sync=True)
        looked_at = traitlets.Unicode().tag(sync=True)
        interval_ms = traitlets.Int().tag(sync=True)

        def __init__(self, store: Any, *, approver: str, limit: int, interval_s: float) -> None:
            self._set_up(store, approver, limit)
            self._tasks: set[Any] = set()
            self._owner = _running_loop() if self.is_async else None
            anywidget.AnyWidget.__init__(self, interval_ms=max(200, round(interval_s * 1000)))
            self.set_trait("approver", _text.escape(approver))
            self.on_msg(self._heard)

        async def _load(self) -> None:
            await super()._load()
            self.items = [shown(request) for request in self.waiting]
            self.looked_at = utc_now().isoformat()

        def _heard(self, _widget: Any, content: Any, _buffers: Any) -> None:
            work = self._answer(content if isinstance(content, dict) else {})
            if not self.is_async:
                self._run(work)
                return
            # JupyterLab delivers what a widget sends in a thread of its own (a subshell), where no store was opened.
            running = asyncio.get_running_loop()
            home = self._owner or running
            task = running.create_task(work) if home is running else asyncio.run_coroutine_threadsafe(work, home)
            self._tasks.add(task)  # kept until it is done: a loop holds its tasks weakly
            task.add_done_callback(self._tasks.discard)

        async def _answer(self, content: dict[str, Any]) -> None:
            verb, approval_id = content.get("do"), str(content.get("approval_id", ""))
            call = next((item["call"] for item in self.items if item["id"] == approval_id), approval_id)
            try:
                if verb in _DONE:
                    await self._decide(verb, approval_id, str(content.get("note", "")))
                    self._say(f"{_DONE[verb]}: {call}", "good" if verb == "approve" else "bad")
                else:
                    await self._load()
            except GatewayStoreError as exc:
                self._say(f"{call}: {exc}" if verb in _DONE else str(exc), "wait")
                if verb in _DONE:
                    await self._answer({"do": "refresh"})
            finally:
                self.send({"answered": verb, "approval_id": approval_id})

        def _say(self, text: str, tone: str) -> None:
            new = {"text": _text.escape(text), "tone": tone, "at": utc_now().strftime("%H:%M:%S")}
            self.said = [new, *self.said][:_ALREADY_SAID]

        def _repr_mimebundle_(self, **options: Any) -> Any:
            found = anywidget.AnyWidget._repr_mimebundle_(self, **options)
            data, metadata = found if isinstance(found, tuple) else (found or {}, {})
            return {**data, "text/plain": Desk.__repr__(self), "text/html": self._repr_html_()}, metadata

    return Inbox
