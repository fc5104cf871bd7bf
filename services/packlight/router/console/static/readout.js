// What packing did for one answer: the strip, the figures, and where the time to the first token went.

import { el } from "./dom.js";
import { against, bytes, count, duration, percent } from "./format.js";
import { Strip } from "./strip.js";

/** Before the first token, in order; then what came between it and the second. Milliseconds of `timings_ms`. */
const BEFORE = [
  ["prepare", "read", (t) => t.prepare],
  ["route", "route", (t) => t.route ?? 0],
  ["queue", "queue", (t) => t.decode_queue + t.prefill_queue],
  ["prefill", "prefill", (t) => t.prefill - t.select],
  ["select", "select and pack", (t) => t.select],
];
const AFTER = [
  ["transfer", "transfer left", (t) => t.transfer],
  ["step", "first step", (t) => t.first_step],
];

/** The strip of a usage, where it explains itself. */
export function stripOf({ kv }) {
  return kv?.explain ? new Strip(kv.explain, kv.prompt_tokens) : null;
}

/** `usage` is the answer's, `strip` its strip or null; `seen` what the browser measured: `{ttft_s, tpot_s}`. */
export function readout(usage, strip, seen) {
  const kv = usage.kv;
  if (!kv) return el("div.readout", {}, el("p.hint", {}, "This server said nothing of packing."));
  const reason = kv.reason ? el("p.reason", {}, `Why ${kv.recipe}: ${kv.reason}.`) : null;
  return el("div.readout", {}, strip?.element, figures(usage), times(kv, seen), reason);
}

function figures({ kv, prompt_tokens_details: details }) {
  const share = kv.kept_tokens / kv.prompt_tokens;
  const cached = details?.cached_tokens ?? 0;
  const codec = kv.codec === "native" ? "" : `, ${kv.codec}`;
  const rows = [
    ["Kept", `${count(kv.kept_tokens)} of ${count(kv.prompt_tokens)} tokens`, percent(share, share < 0.1 ? 1 : 0)],
    ["Shipped", `${bytes(kv.shipped_bytes)} of ${bytes(kv.exact_bytes)}`, against(kv.shipped_bytes, kv.exact_bytes)],
    ["Attention kept", mass(kv.attention_mass_retained), grown(kv)],
    ["Recipe", `${kv.recipe}${codec}`, kv.policy ? "chosen by auto" : "asked for"],
    ["Prefix cache", `${count(cached)} tokens`, cached ? percent(cached / kv.prompt_tokens) : "nothing cached"],
  ];
  if (kv.read_tokens < kv.kept_tokens) {
    rows.splice(1, 0, ["Read per step", `${count(kv.read_tokens)} tokens`, "at most"]);
  }
  const cells = ([name, value, note]) => [el("dt", {}, name), el("dd", {}, value), el("dd.note", {}, note)];
  return el("dl.figures", {}, ...rows.flatMap(cells));
}

function mass(value) {
  return value === null ? "not measured" : percent(value, 1);
}

function grown(kv) {
  return kv.grown_tokens >= 0.5 ? `+${count(kv.grown_tokens)} by the floor` : "of the window’s";
}

function times(kv, { ttft_s, tpot_s }) {
  const timings = kv.timings_ms;
  const before = BEFORE.map(([key, name, value]) => ({ key, name, ms: Math.max(0, value(timings)) }));
  const known = before.reduce((sum, { ms }) => sum + ms, 0);
  if (ttft_s !== null) before.push({ key: "other", name: "network, rest", ms: Math.max(0, 1000 * ttft_s - known) });
  const after = AFTER.map(([key, name, value]) => ({ key, name, ms: Math.max(0, value(timings)) }));
  const total = [...before, ...after].reduce((sum, { ms }) => sum + ms, 0);
  const piece = ({ key, name, ms }) => {
    const node = el("i", { "data-part": key, title: `${name} ${duration(ms / 1000)}` });
    node.style.flexGrow = ms;
    return node;
  };
  const track = el("div.track", {}, ...before.map(piece), el("b.first", { title: "first token" }), ...after.map(piece));
  return el(
    "div.times",
    { "data-total": total },
    el(
      "p.clock",
      {},
      el("span", {}, "First token ", el("b", { "data-figure": "ttft" }, duration(ttft_s))),
      el("span", {}, "then ", el("b", { "data-figure": "tpot" }, duration(tpot_s)), " a token"),
      el("span.note", {}, "in this browser"),
    ),
    track,
    el("ul.legend", {}, ...[...before, ...after].filter(({ ms }) => ms >= 0.05).map(legend)),
  );
}

function legend({ key, name, ms }) {
  return el("li", {}, el("i", { "data-part": key }), `${name} `, el("span", {}, duration(ms / 1000)));
}

/** Draws the time bars of `lanes` to one scale, so that they can be compared. */
export function toOneScale(lanes) {
  const all = lanes.map((lane) => lane.querySelector(".times")).filter(Boolean);
  const longest = Math.max(...all.map((times) => Number(times.dataset.total)));
  for (const times of all) times.querySelector(".track").style.width = `${(100 * times.dataset.total) / longest}%`;
}
