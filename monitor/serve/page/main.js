// The page: who may see it, what is told, and what is shown when.

import { drawBars } from "./chart.js";
import { Detail } from "./detail.js";
import { $, describe, el, setClass, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { List } from "./list.js";
import { clock, count } from "./scale.js";
import { Store } from "./store.js";

const store = new Store();
const detail = new Detail(store);
const list = new List(store, choose);
let overview = null;
let closeUp = null;
let pending = null;
let drawing = false;

function choose(number) {
  clearTimeout(pending);
  // Who runs down the list with a key held does not mean every stream on the way.
  pending = setTimeout(() => watch(number), detail.stream ? 80 : 0);
}

function watch(number) {
  closeUp?.close();
  closeUp = new Feed(`/live/streams/${number}`, {
    stream: (stream) => {
      detail.whole(stream);
      if (stream.ended) closeUp.close(); // there is no more to come
    },
    news: (news) => detail.news(news),
  }, {
    locked: ask,
    gone: () => detail.stream?.n !== number && detail.clear("This stream is not kept any more."),
  });
}

function begin() {
  overview?.close();
  overview = new Feed("/live/events", {
    snapshot: (content) => {
      store.snapshot(content);
      // After a restart of the server another stream may have its number.
      if (detail.stream && store.rows.get(detail.stream.n)?.id !== detail.stream.id) list.chosen = null;
      draw();
    },
    changes: (news) => {
      announce(store.take(news));
      draw();
    },
  }, {
    connected: () => connection("Live", ""),
    lost: () => connection("No connection, trying again", "off"),
    locked: ask,
  });
}

function connection(text, className) {
  setText($("connection"), text);
  setClass($("connection"), className);
}

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (list.chosen === null && store.rows.size) list.pick(store.shown[0]?.n);
    list.update();
    detail.row(store.rows.get(detail.stream?.n));
    drawHeader();
  });
}

function drawHeader() {
  const numbers = store.numbers;
  const { engine, counts, halts } = store;
  describe($("stats"), [
    ["in flight", String(numbers.open)],
    ["held", String(numbers.held)],
    ...(engine ? [["slots", `${engine.used} of ${engine.slots}`], ["waiting", String(engine.waiting)]] : []),
    ["unscored", String(counts.unscored), counts.unscored ? "alarm" : ""],
    ["refused", String(counts.refused)],
    ["errors", String(counts.errors), counts.errors ? "alarm" : ""],
    ...(counts.not_kept ? [["not shown", String(counts.not_kept), "alarm"]] : []),
  ]);
  for (const input of document.querySelectorAll("#filter input")) {
    setText(input.nextElementSibling.querySelector("b"), String(numbers[input.value]));
  }
  if (halts !== drawHeader.drawn) {
    drawHeader.drawn = halts;
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    setText($("halts-count"), `${count(sum(halts.halts), "halt")} of ${sum(halts.ended)} ended`);
    setText($("halts-causes"), halts.causes.map(([cause, n]) => `${cause} ${n}`).join(", "));
    drawBars($("halts-bars"), halts.halts);
  }
  const notice = store.notices.at(-1);
  $("notices").hidden = !notice;
  if (notice && notice !== drawHeader.notice) {
    drawHeader.notice = notice;
    $("notices").replaceChildren(`${clock(notice.at)}  `, el("b", "", notice.kind.replaceAll("_", " ")),
      `  ${notice.facts.replace(/\b([0-9a-f]{12})[0-9a-f]{52}\b/g, "$1")}`);
  }
}

// To those who listen: one sentence at most every two seconds.
const heard = { waiting: [], timer: null };
function announce(halted) {
  heard.waiting.push(...halted);
  if (heard.timer || !heard.waiting.length) return;
  heard.timer = setTimeout(() => {
    heard.timer = null;
    const [first, ...more] = heard.waiting.splice(0);
    const said = more.length ? `${more.length + 1} streams halted`
      : `Stream ${first.id} halted: ${first.cause ?? "cause unknown"}`;
    $("announce").append(el("p", "", said));
    while ($("announce").children.length > 20) $("announce").firstChild.remove();
    announce([]);
  }, 2000);
}

function ask() {
  overview?.close();
  closeUp?.close();
  connection("Waits for the key", "off");
  if (!$("login").open) $("login").showModal();
}

$("login").addEventListener("cancel", (event) => event.preventDefault());
$("login").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = $("key").value;
  setText($("login-error"), "");
  try {
    const answer = await fetch("/live/session", {
      method: "POST", headers: { Authorization: `Bearer ${key}` },
    });
    if (answer.ok) {
      $("key").value = "";
      $("login").close();
      start();
    } else {
      setText($("login-error"), (await answer.json()).error.message);
    }
  } catch {
    setText($("login-error"), "The server does not answer, or the key holds characters no key has.");
  }
});

$("sign-out").addEventListener("click", async () => {
  await fetch("/live/session", { method: "DELETE" });
  location.reload();
});

for (const input of [...document.querySelectorAll("#filter input"), $("order")]) {
  input.addEventListener("change", () => {
    store.show(document.querySelector("#filter input:checked").value, $("order").value);
    $("list").scrollTop = 0;
    list.before = [];
    draw();
  });
}
new ResizeObserver(() => store.halts && drawBars($("halts-bars"), store.halts.halts)).observe($("halts-bars"));

async function start() {
  let session;
  try {
    session = await (await fetch("/live/session", { cache: "no-store" })).json();
  } catch {
    connection("No connection, trying again", "off");
    setTimeout(start, 2000);
    return;
  }
  $("sign-out").hidden = !(session.keys && session.open);
  if (session.open) begin();
  else if (session.keys) ask();
  else detail.clear(session.message);
}

start();
// Time goes on without messages, too: how long a stream has been, and the next order by risk.
setInterval(() => {
  if (detail.stream && !detail.stream.ended) detail.head();
  if (store.counts) draw();
}, 1000);
