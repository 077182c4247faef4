// Shows what waits for a decision. Data is only ever set as text, so nothing in it can become markup.

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const utc = (iso) => (iso ? iso.slice(0, 19).replace("T", " ") + " UTC" : "");

function left(iso) {
  const seconds = Math.round((Date.parse(iso) - Date.now()) / 1000);
  if (!iso || Number.isNaN(seconds)) return "";
  if (seconds <= 0) return "expired";
  if (seconds < 120) return `${seconds} s left`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min left` : `${Math.round(seconds / 3600)} h left`;
}

function row(model, item) {
  const element = make("div", "ags-item");
  const expires = make("span", "ags-expires");
  const facts = make("div", "ags-facts", `${item.caller} asked ${utc(item.asked)} · `);
  facts.append(expires);
  const note = make("input", "ags-note");
  note.placeholder = "note";
  note.setAttribute("aria-label", "note");
  const buttons = make("div", "");
  for (const [verb, word, tone] of [["approve", "Approve", "good"], ["deny", "Deny", "bad"]]) {
    const button = make("button", `ags-${tone}`, word);
    button.type = "button";
    button.addEventListener("click", () => {
      element.querySelectorAll("button").forEach((each) => (each.disabled = true));
      model.send({ do: verb, approval_id: item.id, note: note.value });
    });
    buttons.append(button);
  }
  const act = make("div", "ags-act");
  act.append(note, buttons);
  element.append(make("div", "ags-call", item.call), act, facts, make("div", "", item.why));
  element.append(make("pre", "", item.arguments));
  const tick = () => (expires.textContent = left(item.expires));
  const enable = () => element.querySelectorAll("button").forEach((each) => (each.disabled = false));
  tick();
  return { element, tick, enable };
}

function render({ model, el }) {
  const root = make("div", "ags-view ags-inbox");
  const head = make("div", "ags-title ags-head");
  const who = make("div", "", "Approvals for ");
  const news = make("span", "");
  who.append(make("b", "", model.get("approver")));
  head.append(who, news);
  const list = make("div", "ags-list");
  const none = make("div", "ags-none", "Nothing waits for a decision.");
  const said = make("ul", "ags-said");
  root.append(head, list, none, said);
  el.append(root);

  const rows = new Map();
  let askedAt = 0;

  function showItems() {
    const items = model.get("items");
    const wanted = new Set(items.map((item) => item.id));
    for (const [id, shown] of rows) {
      if (!wanted.has(id)) {
        shown.element.remove();
        rows.delete(id);
      }
    }
    // Rows that stay are left alone: somebody may be writing a note.
    for (const item of items) {
      if (!rows.has(item.id)) rows.set(item.id, row(model, item));
    }
    items.forEach((item, at) => {
      const { element } = rows.get(item.id);
      if (list.children[at] !== element) list.insertBefore(element, list.children[at] ?? null);
    });
    none.style.display = items.length ? "none" : "";
  }

  function showNews() {
    const at = model.get("looked_at");
    news.textContent = at ? `${model.get("items").length} waiting · ${utc(at)}` : "loading";
  }

  function showSaid() {
    said.replaceChildren(
      ...model.get("said").map((each) => {
        const line = make("li", "");
        line.append(make("span", "", each.at), make("span", `ags-badge ags-${each.tone}`, each.text));
        return line;
      }),
    );
  }

  function ask() {
    rows.forEach((shown) => shown.tick());
    // One question at a time: a busy kernel must not find a queue of them. A lost answer is not waited for forever.
    if (document.hidden || Date.now() - askedAt < 15000) return;
    askedAt = Date.now();
    model.send({ do: "refresh" });
  }

  function answered(message) {
    if (message.answered === "refresh") askedAt = 0;
    else rows.get(message.approval_id)?.enable();
  }

  model.on("change:items", showItems);
  model.on("change:looked_at", showNews);
  model.on("change:said", showSaid);
  model.on("msg:custom", answered);
  showItems();
  showNews();
  showSaid();
  ask();
  const timer = setInterval(ask, model.get("interval_ms"));
  return () => {
    clearInterval(timer);
    model.off("change:items", showItems);
    model.off("change:looked_at", showNews);
    model.off("change:said", showSaid);
    model.off("msg:custom", answered);
  };
}

export default { render };
