// The list of streams: only the rows in view exist, so that thousands cost what twenty do.

import { $, el, setClass, setText, svg } from "./dom.js";
import { glyph, risk2, word } from "./scale.js";

const HEIGHT = 30;
const WIDTH = 104;
const TALL = 22;
const SPARK = 40;

export class List {
  constructor(store, choose) {
    this.store = store;
    this.choose = choose;
    this.chosen = null;
    this.pool = [];
    this.box = $("list");
    this.inner = this.box.appendChild(el("div", "rows"));
    this.inner.setAttribute("role", "presentation");
    this.before = [];
    this.box.addEventListener("scroll", () => this.draw());
    this.box.addEventListener("click", (event) => this.clicked(event));
    new ResizeObserver(() => this.draw()).observe(this.box);
    document.addEventListener("keydown", (event) => this.key(event));
  }

  clicked(event) {
    const node = event.target.closest(".row");
    if (node) this.pick(node.number);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inList = event.target === this.box;
    if (event.target.closest("select, dialog")) return; // there, letters choose and are written
    const page = Math.max(1, Math.floor(this.box.clientHeight / HEIGHT) - 1);
    const arrows = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    const step = { j: 1, k: -1 }[event.key] ?? (inList ? arrows[event.key] : undefined);
    if (step !== undefined) this.move(step);
    else if (event.key === "h") this.pick(this.store.latestHalt?.n);
    else return;
    event.preventDefault();
  }

  move(step) {
    const rows = this.store.shown;
    if (!rows.length) return;
    const at = rows.findIndex((row) => row.n === this.chosen);
    const next = at < 0 ? 0 : Math.min(Math.max(at + step, 0), rows.length - 1);
    this.pick(rows[next].n);
  }

  pick(number) {
    if (number === undefined) return;
    this.chosen = number;
    const at = this.store.shown.findIndex((row) => row.n === number);
    if (at >= 0) {
      const top = at * HEIGHT;
      const most = top + HEIGHT - this.box.clientHeight;
      if (this.box.scrollTop > top) this.box.scrollTop = top;
      else if (this.box.scrollTop < most) this.box.scrollTop = most;
    }
    this.draw();
    this.choose(number);
  }

  // While somebody points at the list or works in it, what is before them stays where it is.
  #stay(rows) {
    const top = this.box.scrollTop;
    const busy = this.box.matches(":hover, :focus") || top > HEIGHT;
    if (busy && this.before.length) {
      const first = Math.floor(top / HEIGHT);
      const there = new Map(rows.map((row, at) => [row.n, at]));
      const kept = this.before.slice(first).findIndex((number) => there.has(number));
      if (kept >= 0) {
        const moved = there.get(this.before[first + kept]) - (first + kept);
        if (moved) this.box.scrollTop = top + moved * HEIGHT;
      }
    }
    this.before = rows.map((row) => row.n);
  }

  update() {
    const rows = this.store.shown;
    const height = `${rows.length * HEIGHT}px`;
    if (this.inner.style.height !== height) this.inner.style.height = height;
    $("none").hidden = rows.length > 0 || this.store.rows.size === 0;
    if (rows !== this.drawn) this.#stay(rows);
    this.drawn = rows;
    this.draw();
  }

  draw() {
    const rows = this.store.shown;
    const first = Math.max(0, Math.floor(this.box.scrollTop / HEIGHT) - 1);
    const many = Math.ceil(this.box.clientHeight / HEIGHT) + 3;
    let chosenShown = false;
    for (let i = 0; i < Math.max(many, this.pool.length); i++) {
      const row = i < many ? rows[first + i] : undefined;
      const node = this.pool[i] ?? (this.pool[i] = this.inner.appendChild(blank()));
      node.hidden = row === undefined;
      if (row === undefined) continue;
      const chosen = row.n === this.chosen;
      chosenShown ||= chosen;
      fill(node, row, first + i, rows.length, chosen, this.store.bundles[row.bundle]);
    }
    if (chosenShown) this.box.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    else this.box.removeAttribute("aria-activedescendant");
  }
}

function blank() {
  const node = el("div", "row");
  node.setAttribute("role", "option");
  const id = el("span", "id");
  id.append(el("bdi"));
  const spark = svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${TALL}`, "aria-hidden": true });
  spark.append(svg("line"), svg("polyline"), svg("rect", { width: 4, height: 4 }));
  node.append(el("span", "glyph"), el("span", "word"), id, el("span", "tier"), spark,
    el("span", "number"));
  node.firstChild.setAttribute("aria-hidden", "true");
  return node;
}

function fill(node, row, at, of, chosen, policy) {
  node.number = row.n;
  node.id = `row-${row.n}`;
  node.style.transform = `translateY(${at * HEIGHT}px)`;
  setClass(node, `row ${row.state}${row.ended ? " ended" : ""}`);
  node.setAttribute("aria-selected", chosen);
  node.setAttribute("aria-setsize", of);
  node.setAttribute("aria-posinset", at + 1);
  const [mark, state, id, tier, spark, risk] = node.children;
  setText(mark, glyph(row.state));
  setText(state, word(row));
  setText(id.firstChild, row.id);
  setText(tier, row.tier);
  setText(risk, risk2(row.risk));
  node.setAttribute("aria-label",
    `${word(row)}, stream ${row.id}, ${row.tier}, risk ${risk2(row.risk)}`);
  drawSpark(spark, row, policy?.tiers[row.tier]);
}

function drawSpark(spark, row, levels) {
  const [level, line, halt] = spark.children;
  // The halting level lies in the middle of every line: what counts is how near it is.
  const scale = levels?.halt_at ? 0.5 / levels.halt_at : 1;
  const share = (risk) => Math.min(1, (risk / 1000) * scale);
  const y = (risk) => (TALL - 2 - share(risk) * (TALL - 4)).toFixed(1);
  const begin = SPARK - row.spark.length;
  const x = (i) => (((begin + i) * (WIDTH - 6)) / (SPARK - 1) + 1).toFixed(1);
  const points = row.spark.flatMap((risk, i) => (risk === null ? [] : [`${x(i)},${y(risk)}`]));
  if (points.length === 1) points.unshift(points[0].replace(/^[^,]+/, x(-1)));
  const drawn = points.join(" ");
  if (line.getAttribute("points") !== drawn) line.setAttribute("points", drawn);
  const at = levels ? y(levels.halt_at * 1000) : -9;
  if (level.getAttribute("y1") !== String(at)) {
    for (const [key, value] of Object.entries({ x1: 0, x2: WIDTH, y1: at, y2: at })) {
      level.setAttribute(key, value);
    }
  }
  const last = row.spark.at(-1);
  const halted = row.state === "halted" && last != null;
  halt.setAttribute("visibility", halted ? "visible" : "hidden");
  if (halted) {
    halt.setAttribute("x", WIDTH - 6);
    halt.setAttribute("y", y(last) - 2);
  }
}
