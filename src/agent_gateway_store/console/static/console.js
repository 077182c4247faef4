// What is live: how long is left, and what has changed since the page was read. Without this script every page works.
"use strict";
(() => {
  const body = document.body, said = document.getElementById("said");
  // The server's clock counts, not the one of this machine.
  const ahead = Date.now() - Date.parse(body.dataset.now);
  const POLL_MS = 15000;

  function tick() {
    for (const each of document.querySelectorAll("[data-until]")) {
      const left = Math.floor((Date.parse(each.dataset.until) - Date.now() + ahead) / 1000);
      const over = left < 0;
      const [d, h, m, s] = [Math.floor(left / 86400), Math.floor(left / 3600) % 24, Math.floor(left / 60) % 60, left % 60];
      const two = (n) => String(n).padStart(2, "0");
      each.textContent = over ? "expired" : `${d ? `${d} d ` : ""}${h || d ? `${two(h)}:` : ""}${two(m)}:${two(s)} left`;
      each.classList.toggle("over", over);
      if (over) document.querySelectorAll(".decide button").forEach((button) => { button.disabled = true; });
    }
  }
  tick();
  setInterval(tick, 1000);

  const live = () => document.querySelector("[data-live]");
  if (!body.dataset.events || !live()) return;

  const ids = (root) => new Set([...root.querySelectorAll("[data-id]")].map((each) => each.dataset.id));

  function isBusy(root) {
    const note = root.querySelector("textarea");
    return root.contains(document.activeElement) || root.querySelector("details[open]") || (note && note.value.trim());
  }

  function offer(words, name = "Show") {
    const link = Object.assign(document.createElement("a"), { href: location.href, textContent: name });
    said.replaceChildren(`${words} `, link);
  }

  let busy = false;
  async function look() {
    // A page that answers a form is not to be read again in its place: that would lose what it says.
    if (busy || document.hidden || location.pathname.endsWith("/decision")) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin" });
      if (answer.redirected) {
        if (isBusy(live())) offer("You are signed out. Copy your note, it is not kept.", "Sign in");
        else location.reload();
        return;
      }
      if (!answer.ok) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("[data-live]");
      const shown = live();
      // What agents wrote is never compared here: they choose how long it is.
      if (!fresh || fresh.dataset.version === shown.dataset.version) return;
      const before = ids(shown), arrived = [...ids(fresh)].filter((id) => !before.has(id)).length;
      const list = arrived ? `${arrived} new.` : "The list has changed.";
      const words = shown.querySelector(".requests") ? list : "This request has changed.";
      if (isBusy(shown)) { offer(words); return; }
      shown.replaceWith(document.adoptNode(fresh));
      for (const each of fresh.querySelectorAll("[data-id]")) each.classList.toggle("fresh", !before.has(each.dataset.id));
      said.textContent = words;
      setTimeout(() => { if (said.textContent === words) said.textContent = ""; }, 6000);
      tick();
    } catch { /* The next look tries again. */ } finally { busy = false; }
  }

  let source = null;
  if (window.EventSource) {
    const listen = () => {
      source = new EventSource(body.dataset.events);
      source.addEventListener("inbox", look);
      // A refusal ends it for good; then polling finds out whether to sign in again.
      source.addEventListener("error", () => { if (source.readyState === EventSource.CLOSED) look(); });
    };
    listen();
    window.addEventListener("pagehide", () => source.close());
    window.addEventListener("pageshow", (event) => { if (event.persisted) listen(); });
  }
  setInterval(look, POLL_MS);
  document.addEventListener("visibilitychange", look);
})();
