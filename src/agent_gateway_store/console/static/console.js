// What is live: how long is left, and what has changed since the page was read. Without this script every page works.
"use strict";
(() => {
  const body = document.body, said = document.getElementById("said");
  const POLL_MS = 15000;

  // The database's clock counts, as of when the page was read; the clock of this machine may be wrong, or be set.
  let ahead;
  const setClock = (page) => { ahead = Date.parse(page.body.dataset.now) - performance.now(); };

  function tick() {
    for (const each of document.querySelectorAll("[data-until]")) {
      const left = Math.floor((Date.parse(each.dataset.until) - performance.now() - ahead) / 1000);
      const over = left < 0;
      const [d, h, m, s] = [Math.floor(left / 86400), Math.floor(left / 3600) % 24, Math.floor(left / 60) % 60, left % 60];
      const two = (n) => String(n).padStart(2, "0");
      each.textContent = over ? "expired" : `${d ? `${d} d ` : ""}${h || d ? `${two(h)}:` : ""}${two(m)}:${two(s)} left`;
      each.classList.toggle("over", over);
      if (over) document.querySelectorAll(".decide button").forEach((button) => { button.disabled = true; });
    }
  }
  setClock(document);
  tick();
  setInterval(tick, 1000);

  const live = () => document.querySelector("[data-live]");
  // A page that answers a form is not to be read again in its place: that would lose what it says.
  if (!body.dataset.events || !live() || location.pathname.endsWith("/decision")) return;

  const ids = (root) => new Set([...root.querySelectorAll("[data-id]")].map((each) => each.dataset.id));
  // The secret of a session's forms tells whose page it is.
  const sessionOf = (page) => page.querySelector(".who [name=csrf]")?.value;

  function isBusy(root) {
    const note = root.querySelector("textarea");
    return root.contains(document.activeElement) || root.querySelector("details[open]") || (note && note.value.trim());
  }

  function offer(words, name = "Show") {
    const href = location.pathname + location.search;
    const link = Object.assign(document.createElement("a"), { href, textContent: name });
    said.replaceChildren(`${words} `, link);
  }

  let busy = false, again = false, ended = false, source = null;
  const close = () => source?.close();

  function end(words, name) {
    ended = true;
    close();
    offer(words, name);
  }

  async function look() {
    again = busy;
    if (busy || ended) return;
    busy = true;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", signal: AbortSignal.timeout(POLL_MS) });
      if (answer.redirected) {
        if (isBusy(live())) end("You are signed out. Copy your note, it is not kept.", "Sign in");
        else location.reload();
        return;
      }
      const page = new DOMParser().parseFromString(await answer.text(), "text/html"), session = sessionOf(page);
      // Its forms would decide in the name of somebody else than who this page names.
      if (session && session !== sessionOf(document)) {
        const name = page.querySelector(".who b").textContent;
        end(`${name} has signed in here. This page is not kept up to date.`, "Load it again");
        return;
      }
      const fresh = page.querySelector("[data-live]"), shown = live();
      // Another answer is that of a proxy.
      if (!answer.ok || !fresh) return;
      setClock(page);
      // What agents wrote is never compared here: they choose how long it is.
      if (fresh.dataset.version === shown.dataset.version) return;
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
    // What came meanwhile may not be on the page that was read.
    if (again) await look();
  }

  function listen() {
    if (ended || document.hidden || !window.EventSource || (source && source.readyState !== EventSource.CLOSED)) return;
    source = new EventSource(body.dataset.events);
    source.addEventListener("inbox", look);
    // An answer that is no stream closes it for good: `turn` opens the next one, unless the look ends all.
    source.addEventListener("error", ({ target }) => { if (target.readyState === EventSource.CLOSED) look(); });
  }

  function turn() {
    if (document.hidden) { close(); return; }
    look();
    listen();
  }

  listen();
  setInterval(turn, POLL_MS);
  document.addEventListener("visibilitychange", turn);
  window.addEventListener("pageshow", (event) => { if (event.persisted) turn(); });
  // Over HTTP/1.1 all tabs of a browser share six connections to a host, for one of which the next page would wait.
  for (const leaving of ["submit", "beforeunload", "pagehide"]) window.addEventListener(leaving, close);
})();
