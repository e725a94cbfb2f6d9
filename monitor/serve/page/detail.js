// The chosen stream, large.

import { RiskChart, drawEvidence } from "./chart.js";
import { $, describe, el, setClass, setText } from "./dom.js";
import { replay } from "./replay.js";
import { BREAKS, clock, count, duration, glyph, risk4, riskClass, word } from "./scale.js";

const DRAWN = 3000; // tokens of text on screen; more would make scrolling slow

export class Detail {
  constructor(store) {
    this.store = store;
    this.stream = null;
    this.level = null; // of the replay, null for the policy's own
    this.cursor = null;
    this.chart = new RiskChart($("risk"), (position) => this.point(position));
    $("risk").addEventListener("keydown", (event) => this.key(event));
    $("text").addEventListener("pointermove", (event) => {
      const token = event.target.closest("span[data-to]");
      this.point(token ? Number(token.dataset.to) : null);
    });
    $("text").addEventListener("pointerleave", () => this.point(null));
    $("level").addEventListener("input", () => this.replayAt(Number($("level").value)));
    $("level-reset").addEventListener("click", () => this.replayAt(null));
    new ResizeObserver(() => this.evidence()).observe($("evidence"));
    drawLegend();
  }

  // Nothing is chosen, or what was chosen is not there yet.
  clear(note) {
    this.stream = null;
    $("chosen").hidden = true;
    $("nothing").hidden = false;
    setText($("nothing"), note);
  }

  // All of a stream: when it is chosen, and when it has ended.
  whole(stream) {
    const same = this.stream?.n === stream.n;
    this.stream = stream;
    this.since = performance.now() - stream.age * 1000;
    if (!same) {
      this.level = this.cursor = null;
      $("text").replaceChildren();
    }
    $("chosen").hidden = false;
    $("nothing").hidden = true;
    this.written = 0;
    this.upTo = null;
    $("text").replaceChildren();
    this.index();
    this.draw();
    if (!same) $("text").scrollTop = stream.ended ? 0 : $("text").scrollHeight;
  }

  // What has been added to it.
  news(news) {
    const stream = this.stream;
    if (!stream) return;
    const overlap = news.positions.length && stream.positions.at(-1) === news.positions[0] ? 1 : 0;
    const before = stream.positions.length - overlap;
    stream.positions.splice(before, overlap, ...news.positions);
    stream.risks.splice(before, overlap, ...news.risks);
    for (const [name, values] of Object.entries(news.scores)) {
      stream.scores[name] ??= Array(before + overlap).fill(null);
      stream.scores[name].splice(before, overlap, ...values);
    }
    stream.pieces.push(...news.pieces);
    stream.marks.push(...news.marks);
    this.index();
    this.draw();
  }

  // What its row says has changed.
  row(row) {
    if (!this.stream || this.stream.n !== row?.n || this.stream.ended) return;
    const { state, reason, cause, risk, peak, left, halted_at } = row;
    Object.assign(this.stream, { state, reason, cause, risk, peak, left, halted_at });
    this.curve.newest = this.curve.prompt + left - 1;
    this.head();
  }

  get policy() {
    return this.store.bundles[this.stream.bundle] ?? null;
  }

  // The response as the replay and the chart need it: from the last token of the prompt on.
  index() {
    const stream = this.stream;
    const prompt = stream.report?.prompt_tokens;
    const begin = prompt === undefined ? 0 : stream.positions.findIndex((at) => at >= prompt - 1);
    const from = begin < 0 ? stream.positions.length : begin;
    const first = prompt ?? stream.positions[0] ?? 0;
    this.curve = {
      positions: stream.positions.slice(from),
      risks: stream.risks.slice(from),
      prompt: first,
      newest: first + stream.left - 1,
      gapsAreUnscored: stream.report !== null,
      ended: stream.ended && stream.state === "finished",
      tier: stream.tier,
    };
    this.riskAt = new Map(this.curve.positions.map((at, i) => [at, this.curve.risks[i]]));
  }

  draw() {
    this.head();
    this.text();
    this.drawReplay();
    this.evidence();
  }

  head() {
    const stream = this.stream;
    const levels = this.policy?.tiers[stream.tier];
    setText($("id"), stream.id);
    setText($("state"), `${glyph(stream.state)} ${word(stream)}`);
    setClass($("state"), stream.state);
    setText($("verdict"), verdict(stream, levels));
    const seconds = stream.ended ? stream.age : (performance.now() - this.since) / 1000;
    const report = stream.report;
    describe($("facts"), [
      ["model", stream.model],
      ...(stream.client ? [["client", stream.client]] : []),
      ["tier", stream.tier],
      ["bundle", stream.bundle.slice(0, 12)],
      ["began", clock(stream.at)],
      [stream.ended ? "took" : "for", duration(seconds)],
      ["released", count(stream.left, "token")],
      ["peak risk", risk4(stream.peak)],
      ...(report ? [["scored", String(report.scored)], ["unscored", String(report.unscored)]] : []),
    ]);
    const horizon = levels?.horizon;
    setText($("risk-title"), horizon === undefined ? "Risk"
      : horizon === 0 ? "Risk: chance of a violation now"
        : `Risk: chance of a violation within ${count(horizon, "token")}`);
  }

  text() {
    const stream = this.stream;
    const box = $("text");
    const follows = box.scrollTop + box.clientHeight > box.scrollHeight - 30;
    const note = this.store.text ? "" : "Text is not shown; each dot is a character.";
    setText($("text-note"), note);
    box.classList.toggle("lengths", !this.store.text);
    box.querySelector(".end")?.remove();
    const depth = this.policy?.hold_back;
    const ahead = Number.isInteger(depth) ? depth - 1 : 0;
    if (this.written === 0 && stream.pieces.length > DRAWN) {
      this.written = stream.pieces.length - DRAWN;
      box.append(el("span", "early", `… ${count(this.written, "piece")} before this`));
    }
    const fragment = document.createDocumentFragment();
    for (; this.written < stream.pieces.length; this.written++) {
      const [position, written] = stream.pieces[this.written];
      const to = position === null ? (this.curve.positions.at(-1) ?? 0) : position - ahead;
      const from = Math.min(to, this.upTo === null ? this.curve.prompt : this.upTo + 1);
      this.upTo = to;
      const shown = typeof written === "string" ? written : "·".repeat(Math.min(written, 60));
      const token = el("span", riskClass(this.most(from, to)), shown);
      token.dataset.from = from;
      token.dataset.to = to;
      fragment.append(token);
    }
    box.append(fragment);
    while (box.children.length > DRAWN + 1) box.firstChild.remove();
    if (stream.state === "halted") box.append(el("span", "end", halted(stream)));
    if (follows) box.scrollTop = box.scrollHeight;
  }

  most(from, to) {
    let most = null;
    for (let at = from; at <= to; at++) {
      const risk = this.riskAt.get(at) ?? null;
      if (risk !== null && (most === null || risk > most)) most = risk;
    }
    return most;
  }

  replayAt(level) {
    this.level = level;
    this.drawReplay();
  }

  drawReplay() {
    const { stream, policy, curve } = this;
    const levels = policy?.tiers[stream.tier];
    $("replay").hidden = !levels;
    let found = null;
    if (levels) {
      const level = this.level ?? levels.halt_at;
      if (Number($("level").value) !== level) $("level").value = level;
      setText($("level-value"), this.level === null ? String(level) : level.toFixed(3));
      $("level-reset").disabled = this.level === null;
      if (this.level !== null) found = replay(curve, policy, level);
      setText($("replay-result"), outcome(stream, curve.newest, found, policy));
    }
    for (const token of $("text").querySelectorAll("span[data-to]")) {
      token.classList.toggle("stays", found !== null && Number(token.dataset.to) > found.left);
    }
    this.drawChart(levels, found);
  }

  drawChart(levels = this.shownLevels, found = this.found) {
    this.shownLevels = levels;
    this.found = found;
    this.chart.draw({
      ...this.curve,
      levels: levels ?? null,
      other: this.level,
      haltedAt: this.stream.halted_at,
      otherAt: found?.haltedAt ?? null,
      holds: holds(this.stream.marks),
      cursor: this.cursor,
    });
  }

  evidence() {
    const stream = this.stream;
    if (!stream) return;
    const known = new Map((this.policy?.probes ?? []).map((probe) => [probe.name, probe]));
    const scored = Object.keys(stream.scores).length > 0;
    const probes = Object.entries(stream.scores)
      .map(([name, values]) => ({ name, values, ...known.get(name) }))
      .filter((probe) => (probe.reads ?? "response") === "response")
      .map((probe) => ({
        hazard: "",
        ...probe,
        values: probe.values.slice(stream.positions.length - this.curve.positions.length),
      }));
    drawEvidence($("evidence"), this.curve.positions, probes, stream);
    const about = "Logit of each token, drawn up to ±5; the line is even odds.";
    setText($("evidence-note"), scored ? about
      : stream.ended ? "The monitor kept no scores of this stream." : "Comes with the stream's end.");
  }

  point(position) {
    if (!this.stream || position === this.cursor) return;
    this.cursor = position;
    this.drawChart();
    const at = this.curve.positions.indexOf(position);
    const token = position === null ? null
      : [...$("text").querySelectorAll("span[data-to]")].find(
        (node) => node.dataset.from <= position && position <= node.dataset.to);
    $("text").querySelector(".here")?.classList.remove("here");
    token?.classList.add("here");
    const risk = at < 0 ? null : this.curve.risks[at];
    const said = at < 0 ? "" : `token ${position}, risk ${risk4(risk)}`;
    setText($("cursor"), said + (said && token && this.store.text ? `, “${token.textContent}”` : ""));
    const slider = $("risk");
    slider.setAttribute("aria-valuemin", this.curve.positions[0] ?? 0);
    slider.setAttribute("aria-valuemax", this.curve.positions.at(-1) ?? 0);
    slider.setAttribute("aria-valuenow", position ?? this.curve.positions[0] ?? 0);
    slider.setAttribute("aria-valuetext", $("cursor").textContent);
  }

  key(event) {
    const { positions } = this.curve ?? { positions: [] };
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 };
    const step = steps[event.key];
    if (step === undefined || !positions.length) return;
    event.preventDefault();
    const at = positions.indexOf(this.cursor);
    const next = at < 0 ? (step < 0 ? positions.length - 1 : 0) : at + step;
    this.point(positions[Math.max(0, Math.min(positions.length - 1, next))]);
  }
}

function verdict(stream, levels) {
  const above = levels ? `; ${stream.tier} halts at ${levels.halt_at}` : "";
  const at = stream.halted_at === null ? "" : ` at token ${stream.halted_at}`;
  if (stream.state === "halted") {
    return `Halted${at}: ${stream.cause ?? "cause unknown"}. Risk ${risk4(stream.risk)}${above}.`;
  }
  if (stream.state === "error") return `Ended by an error: ${stream.reason ?? "unknown"}`;
  if (stream.state === "waiting") return "Waits for a slot.";
  if (stream.state === "held") {
    return `Held: nothing leaves until a later token is judged and allowed. Risk ${risk4(stream.risk)}${above}.`;
  }
  const said = stream.ended ? "Not halted" : "Allowed to go on";
  return `${said}. Risk ${risk4(stream.risk)}${above}.`;
}

const halted = (stream) => (stream.halted_at === null ? "halted" : `halted at ${stream.halted_at}`);

// In words. left is the position of the last token that has left.
function outcome(stream, left, found, policy) {
  if (found === null) return "Move the level to see where this stream would have been halted.";
  const sofar = stream.ended ? "" : "So far: ";
  const fewer = left - found.left;
  const stays = fewer > 0 ? ` ${count(fewer, "token")} that left would not have left.`
    : fewer < 0 ? ` ${count(-fewer, "token")} that stayed would have left.` : " The same tokens would have left.";
  const segments = policy.segments.length ? " One level for all its segments." : "";
  let said;
  if (found.haltedAt === null && stream.state === "halted") {
    said = `would not have been halted by any token it wrote; what it would have written next is not known.${stays}`;
  } else if (found.haltedAt === null) {
    said = `would not have been halted.${stays}`;
  } else if (found.haltedAt === stream.halted_at) {
    said = `would have been halted at the same token, ${found.haltedAt}.${stays}`;
  } else {
    said = `would have been halted at token ${found.haltedAt}.${stays}`;
  }
  return sofar + (sofar ? said : said[0].toUpperCase() + said.slice(1)) + segments;
}

// Spans of positions during which nothing left.
function holds(marks) {
  const spans = [];
  let from = null;
  for (const [position, said] of marks) {
    if (said === "HOLD") from = position;
    else if (from !== null) {
      spans.push([from, position]);
      from = null;
    }
  }
  return from === null ? spans : [...spans, [from, null]];
}

function drawLegend() {
  const legend = $("legend");
  const steps = el("div");
  ["0", ...BREAKS].forEach((edge, i) => {
    steps.append(el("i", `r${i}`, String(edge).replace(/^0\./, ".")));
  });
  legend.append(el("span", "", "risk"), steps);
}
