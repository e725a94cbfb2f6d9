// What a stream would have been judged with another halting level. Risk does not depend on the
// level, so this is exact for every token that was judged; the rules are those of the kernels
// (reference_advance.py) and of holdback.py, with which tests compare it.

// A stream: positions and risks (null where a token was not judged), ascending; prompt, how many
// of the positions it has; ended, whether by itself.
// levels: halt_at, hold_at, release_at (null where there are none), as the policy has them.
// Gaps in a report's positions are tokens without a score; in a stream in flight they are tokens
// of which nothing was told yet.
export function judge({ positions, risks, prompt, gapsAreUnscored }, levels, onUnscored) {
  const haltAt = Math.fround(levels.halt_at); // the kernels compare in fp32
  const holdAt = Math.fround(levels.hold_at ?? 2);
  const releaseAt = Math.fround(levels.release_at ?? levels.hold_at ?? 2);
  const verdicts = [];
  let verdict = "CONTINUE";
  let expected = prompt;
  for (let i = 0; i < positions.length; i++) {
    const at = positions[i];
    const risk = risks[i];
    if (at < prompt - 1) {
      verdicts.push(verdict); // of the prompt only its last token is judged
      continue;
    }
    const inPrompt = at < prompt;
    const gap = gapsAreUnscored && at > expected && !inPrompt;
    expected = Math.max(expected, at + 1);
    const missing = gap || (risk === null && !inPrompt);
    const held = verdict === "HOLD" || (missing && onUnscored === "hold");
    if (verdict !== "HALT") {
      if (risk !== null) {
        if (risk >= haltAt) verdict = "HALT";
        else if (risk >= holdAt || (held && risk >= releaseAt)) verdict = "HOLD";
        else verdict = "CONTINUE";
      } else if (held) {
        verdict = "HOLD";
      }
      if (missing && onUnscored === "halt") verdict = "HALT";
    }
    verdicts.push(verdict);
  }
  return verdicts;
}

// Position of the last token that leaves; prompt - 1 where none does. newest is the position of
// the last token that is known to have been sampled.
export function lastLeft(stream, verdicts, holdBack, onUnscored) {
  const { positions, prompt, ended, newest } = stream;
  let left = prompt - 1;
  let verdict = "CONTINUE";
  for (let i = 0; i < positions.length; i++) {
    if (positions[i] < prompt - 1) continue;
    verdict = verdicts[i];
    if (verdict === "HALT") return left;
    if (verdict === "CONTINUE" && holdBack !== "turn") {
      left = Math.max(left, positions[i] - holdBack + 1);
    }
  }
  if (!ended || verdict !== "CONTINUE") return left;
  // Tokens that were sampled last and never fed leave unjudged, where the policy says so.
  const unfed = onUnscored === "pass" ? newest : prompt - 1;
  return Math.max(left, positions.at(-1) ?? prompt - 1, unfed);
}

// Both at once, for one halting level.
export function replay(stream, policy, haltAt) {
  const levels = { ...policy.tiers[stream.tier], halt_at: haltAt };
  const verdicts = judge(stream, levels, policy.on_unscored);
  const halt = verdicts.indexOf("HALT");
  return {
    haltedAt: halt < 0 ? null : stream.positions[halt],
    left: lastLeft(stream, verdicts, policy.hold_back, policy.on_unscored),
  };
}
