// Curves in SVG: the risk, and the evidence of each probe.

import { el, setText, svg } from "./dom.js";

const LEFT = 34;
const RIGHT = 80;
const TOP = 16;
const BOTTOM = 20;

export class RiskChart {
  constructor(box, point) {
    this.box = box;
    this.point = point; // called with a position that was pointed at, or null
    new ResizeObserver(() => this.last && this.draw(this.last)).observe(box);
    box.addEventListener("pointermove", (event) => this.moved(event));
    box.addEventListener("pointerleave", () => this.point(null));
  }

  moved(event) {
    const { positions } = this.last ?? { positions: [] };
    if (!positions.length) return;
    const x = event.clientX - this.box.getBoundingClientRect().left;
    const at = this.from + ((x - LEFT) / this.wide) * (this.to - this.from);
    const near = (a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a);
    this.point(positions.reduce(near));
  }

  // positions, risks, levels, other (a level or null), haltedAt, otherAt, holds [[from, to]],
  // cursor (a position or null)
  draw(what) {
    this.last = what;
    const width = this.box.clientWidth;
    const height = this.box.clientHeight;
    if (!width) return;
    const { positions, risks } = what;
    this.wide = width - LEFT - RIGHT;
    this.from = positions[0] ?? 0;
    this.to = Math.max(positions.at(-1) ?? 1, this.from + 20);
    const x = (at) => LEFT + ((at - this.from) / (this.to - this.from)) * this.wide;
    const y = (risk) => height - BOTTOM - risk * (height - TOP - BOTTOM);

    const axis = svg("g", { class: "axis" });
    for (const risk of [0, 0.25, 0.5, 0.75, 1]) {
      axis.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(risk), y2: y(risk) }));
      if (risk !== 0.25 && risk !== 0.75) {
        axis.append(svg("text", { x: LEFT - 6, y: y(risk) + 4, class: "end" }, String(risk)));
      }
    }
    for (const at of ticks(this.from, this.to, this.wide / 90)) {
      if (x(at) < LEFT + 12) continue; // where "token" stands
      axis.append(svg("text", { x: x(at), y: height - 4, class: "middle" }, String(at)));
    }

    axis.append(svg("text", { x: LEFT - 6, y: height - 4, class: "end" }, "token"));

    const marks = svg("g", { class: "marks" });
    for (const [from, to] of what.holds) {
      const left = x(from - 0.5);
      const right = x((to ?? this.to) + 0.5);
      axis.append(svg("rect", { class: "hold-span", x: left, width: right - left, y: y(1),
        height: y(0) - y(1) }));
      if (right - left > 34) {
        marks.append(svg("text", { x: left + 4, y: y(1) + 12, class: "hold" }, "held"));
      }
    }
    // Levels are named beside the plot, where no curve runs; names that are too near move apart.
    const named = [];
    const level = (risk, className, text, kind) => {
      axis.append(svg("line", { class: className, x1: LEFT, x2: width - RIGHT, y1: y(risk), y2: y(risk) }));
      named.push({ at: y(risk) + 4, text, kind });
    };
    const { levels, other } = what;
    if (levels) {
      level(levels.halt_at, "level", `halts ${levels.halt_at}`, "halt");
      if (levels.hold_at !== null) level(levels.hold_at, "hold-level", `holds ${levels.hold_at}`, "hold");
      if (other !== null) level(other, "other", `replay ${other}`, "else");
    }
    named.sort((one, two) => one.at - two.at);
    named.forEach((name, i) => {
      if (i) name.at = Math.max(name.at, named[i - 1].at + 13);
      const text = svg("text", { x: width - RIGHT + 5, y: name.at, class: name.kind }, name.text);
      marks.append(text);
    });

    const curve = svg("path", { class: "curve", d: path(positions, risks, x, y) });
    const halt = (at, className, text, kind) => {
      marks.append(svg("line", { class: className, x1: x(at), x2: x(at), y1: y(1), y2: y(0) }));
      // The names of two halts that are near each other would lie on the other's line.
      const crowded = kind === "else" && what.haltedAt !== null && x(what.haltedAt) - x(at) < 100;
      const end = crowded ? x(at) > LEFT + 100 : x(at) > LEFT + this.wide * 0.6;
      const beside = crowded && !end ? x(what.haltedAt) : x(at);
      marks.append(svg("text", { x: beside + (end ? -6 : 6), y: kind === "else" ? y(1) + 14 : y(1) - 4,
        class: kind, "text-anchor": end ? "end" : "start" }, text));
    };
    if (what.otherAt !== null && what.otherAt !== what.haltedAt) {
      halt(what.otherAt, "other", `would halt at ${what.otherAt}`, "else");
    }
    if (what.haltedAt !== null) {
      halt(what.haltedAt, "halt-at", `halted at ${what.haltedAt}`, "halt");
      marks.append(svg("rect", { class: "halt-box", x: x(what.haltedAt) - 4, y: y(1) - 4, width: 8,
        height: 8 }));
    }
    if (what.cursor !== null) {
      const risk = risks[positions.indexOf(what.cursor)];
      marks.append(svg("line", { class: "at", x1: x(what.cursor), x2: x(what.cursor), y1: y(1), y2: y(0) }));
      if (risk != null) {
        marks.append(svg("circle", { class: "at-dot", cx: x(what.cursor), cy: y(risk), r: 3.5 }));
      }
    }
    const drawing = svg("svg", { width, height, "aria-hidden": true });
    drawing.append(axis, curve, marks);
    this.box.replaceChildren(drawing);
  }
}

// A probe's logits. Cut at 5 either way: beyond that the odds are under 1 to 148.
const CUT = 5;

export function drawEvidence(box, positions, probes, { cause, ended }) {
  while (box.children.length > probes.length) box.lastChild.remove();
  probes.forEach((probe, i) => {
    const figure = box.children[i] ?? box.appendChild(panel());
    const [caption, plot] = figure.children;
    figure.className = probe.name === cause ? "cause" : "";
    setText(caption.children[0], probe.name);
    setText(caption.children[1], probe.hazard);
    const shown = probe.values.filter((value) => value !== null);
    const said = (logit) => logit.toFixed(1).replace(/^-0\.0$/, "0.0");
    const most = shown.reduce((a, b) => Math.max(a, b), -Infinity);
    setText(caption.children[2], !shown.length ? "–"
      : `${ended ? "last" : "now"} ${said(shown.at(-1))}, most ${said(most)}`);
    const width = plot.clientWidth;
    const height = plot.clientHeight;
    const from = positions[0] ?? 0;
    const to = Math.max(positions.at(-1) ?? 1, from + 20);
    const x = (at) => ((at - from) / (to - from)) * width;
    const y = (logit) => {
      const cut = Math.max(-CUT, Math.min(CUT, logit));
      return 2 + ((CUT - cut) / (2 * CUT)) * (height - 4);
    };
    const drawing = svg("svg", { width, height, role: "img",
      "aria-label": `${probe.name}: logits, ${caption.children[2].textContent}` });
    drawing.append(
      svg("line", { class: "zero", x1: 0, x2: width, y1: y(0), y2: y(0) }),
      svg("path", { class: "over", d: area(positions, probe.values, x, y) }),
      svg("path", { class: "curve", d: path(positions, probe.values, x, y) }),
    );
    plot.replaceChildren(drawing);
  });
}

function panel() {
  const figure = el("figure");
  const caption = el("figcaption");
  caption.append(el("b"), el("span", "hazard soft"), el("span", "value soft"));
  figure.append(caption, el("div", "plot"));
  return figure;
}

// Bars of counts, the newest at the right.
export function drawBars(box, counts) {
  const width = box.clientWidth;
  const height = box.clientHeight;
  if (!width) return;
  const tall = height - 13;
  const most = Math.max(4, ...counts);
  const step = width / counts.length;
  const drawing = svg("svg", { width, height, role: "img",
    "aria-label": `Halts, last ten minutes: ${counts.reduce((a, b) => a + b, 0)}` });
  drawing.append(svg("line", { x1: 0, x2: width, y1: tall + 0.5, y2: tall + 0.5 }));
  counts.forEach((n, i) => {
    const high = (n / most) * tall;
    if (n) {
      drawing.append(svg("rect", { x: (i * step).toFixed(1), width: Math.max(1, step - 1).toFixed(1),
        y: (tall - high).toFixed(1), height: high.toFixed(1) }));
    }
  });
  drawing.append(svg("text", { x: 0, y: height - 1 }, "10 min ago"),
    svg("text", { x: width, y: height - 1, "text-anchor": "end" }, "now"));
  box.replaceChildren(drawing);
}

// A line through the points, broken where there is no value. More points than columns of the
// screen are thinned to the least and the greatest of each column, so that no peak is lost.
function path(positions, values, x, y) {
  let drawn = "";
  let pen = "M";
  let column = null;
  const flush = () => {
    if (column === null) return;
    const { at, first, low, high, last } = column;
    const points = first === last && low === high ? [first] : [first, low, high, last];
    for (const value of points) {
      drawn += `${pen}${at.toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    }
    column = null;
  };
  positions.forEach((position, i) => {
    const value = values[i];
    if (value === null || value === undefined) {
      flush();
      pen = "M";
      return;
    }
    const at = x(position);
    if (column !== null && at - column.at < 0.5) {
      column.low = Math.min(column.low, value);
      column.high = Math.max(column.high, value);
      column.last = value;
      return;
    }
    flush();
    column = { at, first: value, low: value, high: value, last: value };
  });
  flush();
  return drawn;
}

// What lies above even odds.
function area(positions, values, x, y) {
  const above = values.map((value) => (value === null ? null : Math.max(0, value)));
  const line = path(positions, above, x, y);
  if (!line) return "";
  const ends = line.slice(1).split(/[ML]/);
  const [first] = ends[0].split(" ");
  const [last] = ends.at(-1).split(" ");
  return `M${first} ${y(0)}L${line.slice(1).replaceAll("M", "L")}L${last} ${y(0)}Z`;
}

function ticks(from, to, many) {
  const rough = (to - from) / Math.max(1, many);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, power * [1, 2, 5, 10].find((n) => n * power >= rough));
  const found = [];
  for (let at = Math.ceil(from / step) * step; at <= to; at += step) found.push(at);
  return found;
}
