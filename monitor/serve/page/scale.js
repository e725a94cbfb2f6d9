// Risk as one of eight steps, and numbers as words.

// Finer where streams spend most of their time, and where policies put their levels.
export const BREAKS = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75];

export const riskClass = (risk) =>
  risk === null ? "" : `r${BREAKS.filter((edge) => risk >= edge).length}`;

export const risk4 = (risk) => (risk === null ? "–" : risk.toFixed(4));

export const risk2 = (risk) => (risk === null ? "–" : risk.toFixed(2));

export const count = (n, one, many = `${one}s`) =>
  `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

export const clock = (seconds) =>
  new Date(seconds * 1000).toLocaleTimeString("en-GB", { hour12: false });

const GLYPHS = { waiting: "○", writing: "▸", held: "‖", halted: "■", finished: "✓", error: "✕" };

export const glyph = (state) => GLYPHS[state];

// What a row says of a stream, in one word.
export function word(row) {
  if (row.state !== "finished") return row.state;
  return row.reason === "stop" ? "finished" : (row.reason ?? "finished");
}
