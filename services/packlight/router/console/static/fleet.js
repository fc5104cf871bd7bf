// The fleet as it is now: workers, their pages and queues, and what this router has done since it started.

import { clearedContext, colour, el, keepDrawn } from "./dom.js";
import { against, bytes, count, duration, percent, rate } from "./format.js";

const SECONDS = 60;

export class FleetPanel {
  constructor(root) {
    this.workers = el("div.workers");
    this.totals = el("dl.figures.two");
    this.speed = new Trend("tokens a second");
    this.inflight = new Trend("requests in progress");
    this.before = null;
    root.append(this.workers, el("h3", {}, "This router"), this.totals, this.speed.element, this.inflight.element);
  }

  /** `fleet` is what `/console/fleet` says, `at` when, in seconds. */
  update(fleet, at) {
    this.workers.replaceChildren(...fleet.workers.map(worker));
    if (!fleet.workers.length) this.workers.append(el("p.hint", {}, "No worker has reported."));
    const { totals } = fleet;
    const made = totals.generated_tokens;
    if (this.before) this.speed.add(Math.max(0, (made - this.before.made) / (at - this.before.at)));
    this.before = { made, at };
    this.inflight.add(fleet.inflight);
    const hits = totals.prompt_tokens ? percent(totals.cached_prompt_tokens / totals.prompt_tokens) : "–";
    const rows = [
      ["Requests done", count(totals.requests)],
      ["In progress", `${fleet.inflight} of ${count(fleet.max_inflight)}`],
      ["Prompt from cache", hits],
      ["Shipped", `${bytes(totals.shipped_bytes)}`],
      ["against exact", against(totals.shipped_bytes, totals.exact_bytes) || "–"],
    ];
    this.totals.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }
}

function worker(one) {
  const rows = [...load(one)];
  if (one.role === "prefill") rows.push(["Prefill", rate(one.tokens_per_s, "tokens/s")]);
  else rows.push(["Step", one.step_s ? duration(one.step_s) : "–"]);
  if (one.ship_bytes_per_s) rows.push(["Ships", `${bytes(one.ship_bytes_per_s)}/s`]);
  if (one.local_prefill) rows.push(["Prefills itself", rate(one.local_prefill.tokens_per_s, "tokens/s")]);
  const name = one.id === one.role ? null : el("span", {}, one.id);
  return el(
    "section.worker",
    { "data-role": one.role },
    el("h3", {}, one.role, name, one.draining ? el("em", {}, "draining") : null),
    pages(one),
    el("dl.figures.two", {}, ...rows.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])),
  );
}

function load(one) {
  const queued = one.queued ? ` · ${one.queued} wait` : "";
  return [["Running", `${one.running}${queued}`]];
}

function pages(one) {
  const used = one.total_pages - one.free_pages;
  const share = one.total_pages ? used / one.total_pages : 0;
  const bar = el("i");
  bar.style.width = `${100 * share}%`;
  const unit = one.role === "prefill" ? "blocks" : "head pages";
  const label = `${count(used)} of ${count(one.total_pages)} ${unit}`;
  return el("div.pages", { title: `${label} held by requests` }, el("div.bar", {}, bar), el("p", {}, label));
}

/** A minute of one number, as a line. */
class Trend {
  constructor(name) {
    this.name = name;
    this.values = [];
    this.canvas = el("canvas");
    this.now = el("b", {}, "0");
    this.element = el("figure.trend", {}, this.canvas, el("figcaption", {}, this.now, ` ${name}`));
    keepDrawn(this.canvas, () => this.#draw());
  }

  add(value) {
    this.values = [...this.values, value].slice(-SECONDS);
    this.now.textContent = value < 10 && value % 1 ? value.toFixed(1) : count(value);
    this.#draw();
  }

  #draw() {
    const cleared = clearedContext(this.canvas);
    if (!cleared) return;
    const { context, width, height } = cleared;
    const top = Math.max(1, ...this.values);
    const x = (index) => width - ((this.values.length - 1 - index) * width) / (SECONDS - 1);
    const y = (value) => height - 1 - (value / top) * (height - 3);
    context.strokeStyle = colour(this.canvas, "--line");
    context.strokeRect(0, height - 0.5, width, 0);
    context.strokeStyle = colour(this.canvas, "--kept");
    context.lineWidth = 1.25;
    context.lineJoin = "round";
    context.beginPath();
    this.values.forEach((value, index) => context.lineTo(x(index), y(value)));
    context.stroke();
  }
}
