// The prompt as a strip: a row for each group of layers, a column for each bin, darker where more was kept.

import { clearedContext, colour, el, keepDrawn } from "./dom.js";
import { count, percent } from "./format.js";

const ROW = 11;
const GAP = 2;
const CONTEXT = 60; // characters of text shown on each side of the bin that is looked at
const LEVELS = 6;

/** The strip of one answer. `explain` is the answer's `usage.kv.explain`. */
export class Strip {
  constructor(explain, numTokens) {
    this.explain = explain;
    this.numTokens = numTokens;
    this.numBins = explain.texts.length;
    this.bin = 0;
    this.element = this.#build();
  }

  #build() {
    const { groups } = this.explain;
    this.canvas = el("canvas");
    this.canvas.style.height = `${groups.length * (ROW + GAP) - GAP}px`;
    this.cursor = el("i.cursor", { hidden: true });
    this.field = el(
      "div.field",
      {
        role: "slider",
        tabindex: 0,
        "aria-label": "Prompt: move through it to read what was kept",
        "aria-valuemin": 0,
        "aria-valuemax": this.numBins - 1,
        onpointermove: (event) => this.#look(this.#binAt(event)),
        onpointerdown: (event) => this.#look(this.#binAt(event)),
        onkeydown: (event) => this.#press(event),
        onfocus: () => this.#look(this.bin),
        onpointerleave: () => this.#leave(),
        onblur: () => this.#leave(),
      },
      this.canvas,
      this.cursor,
    );
    const labels = groups.map((group) => el("span", {}, layers(group)));
    this.kept = groups.map(() => el("span"));
    this.showTotals();
    this.reading = el("p.reading", {}, "Point at the strip to read the prompt.");
    keepDrawn(this.canvas, () => this.#draw());
    return el(
      "div.strip",
      {},
      el(
        "div.map",
        {},
        el("div.labels", { title: "layers" }, ...labels),
        this.field,
        el("div.labels.right", { title: "prompt tokens kept, mean over layers and KV heads" }, ...this.kept),
      ),
      el(
        "div.scale",
        {},
        el("span", {}, "layers"),
        el("span.ends", {}, el("span", {}, "first token"), el("span", {}, `token ${count(this.numTokens)}`)),
        el("span", {}, "kept"),
      ),
      this.reading,
      this.#wholeText(),
    );
  }

  #draw() {
    const cleared = clearedContext(this.canvas);
    if (!cleared) return;
    const { context, scale } = cleared;
    const { width } = this.canvas;
    const [drop, kept] = [colour(this.canvas, "--drop"), colour(this.canvas, "--kept")];
    context.resetTransform(); // whole pixels, so that bins leave no seams
    this.explain.groups.forEach(({ shares }, row) => {
      const [top, end] = [row * (ROW + GAP), row * (ROW + GAP) + ROW].map((y) => Math.round(y * scale));
      context.globalAlpha = 1;
      context.fillStyle = drop;
      context.fillRect(0, top, width, end - top);
      context.fillStyle = kept;
      for (let x = 0; x < width; x += 1) {
        context.globalAlpha = meanOf(shares, x, width) ** 0.75;
        context.fillRect(x, top, 1, end - top);
      }
    });
  }

  #binAt(event) {
    const { left, width } = this.field.getBoundingClientRect();
    return Math.floor(((event.clientX - left) / width) * this.numBins);
  }

  #press(event) {
    const page = Math.max(1, Math.round(this.numBins / 20));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -page, PageUp: page };
    const ends = { Home: -this.numBins, End: this.numBins };
    const step = steps[event.key] ?? ends[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.#look(this.bin + step);
  }

  #look(bin) {
    this.show(bin);
    this.element.dispatchEvent(new CustomEvent("look", { bubbles: true, detail: this }));
  }

  #leave() {
    this.showTotals();
    this.element.dispatchEvent(new CustomEvent("leave", { bubbles: true, detail: this }));
  }

  show(bin) {
    this.bin = Math.max(0, Math.min(this.numBins - 1, bin));
    const { texts, groups, bin_tokens: width } = this.explain;
    const first = this.bin * width;
    const last = Math.min(first + width, this.numTokens) - 1;
    const share = this.share(this.bin);
    this.cursor.hidden = false;
    this.cursor.style.left = `${(100 * (this.bin + 0.5)) / this.numBins}%`;
    const before = texts.slice(0, this.bin).join("").slice(-CONTEXT);
    const after = texts.slice(this.bin + 1).join("").slice(0, CONTEXT);
    const where = first === last ? `Token ${count(first + 1)}` : `Tokens ${count(first + 1)} to ${count(last + 1)}`;
    groups.forEach((group, row) => (this.kept[row].textContent = percent(group.shares[this.bin])));
    this.reading.replaceChildren(
      el("span.where", {}, `${where}, ${percent(share)} kept`),
      el(
        "span.words",
        {},
        el("span", {}, oneLine(before)),
        el("mark", {}, oneLine(texts[this.bin]) || "·"),
        el("span", {}, oneLine(after)),
      ),
    );
    this.field.setAttribute("aria-valuenow", this.bin);
    this.field.setAttribute("aria-valuetext", `${where}, ${percent(share)} kept: ${texts[this.bin]}`);
  }

  /** The right column: tokens of the whole prompt, while no bin is looked at. */
  showTotals() {
    this.explain.groups.forEach((group, row) => (this.kept[row].textContent = count(group.kept_tokens)));
  }

  /** Of a bin, over all layers. Groups differ by one layer at most, so they count alike. */
  share(bin) {
    const { groups } = this.explain;
    return groups.reduce((sum, group) => sum + group.shares[bin], 0) / groups.length;
  }

  /** The prompt's text, as faint as little of it was kept. Made when it is opened: it may be long. */
  #wholeText() {
    const body = el("div.prompt-text", { tabindex: 0, "aria-label": "The prompt" });
    const details = el("details.whole", {}, el("summary", {}, "Read the prompt as it was kept"), body);
    details.addEventListener("toggle", () => {
      if (!details.open || body.childNodes.length) return;
      body.append(
        ...this.explain.texts.map((text, bin) => {
          const share = this.share(bin);
          const title = `${percent(share)} kept`;
          return el("span", { "data-level": Math.round(share * (LEVELS - 1)), title }, text);
        }),
      );
    });
    return details;
  }
}

function layers({ first_layer: first, last_layer: last }) {
  return first === last ? `${first}` : `${first}–${last}`;
}

/** What pixel `x` of `width` shows of `values`: the mean of those that lie in it, else the one that it lies in. */
function meanOf(values, x, width) {
  const first = Math.floor((x * values.length) / width);
  const end = Math.max(first + 1, Math.floor(((x + 1) * values.length) / width));
  let sum = 0;
  for (let index = first; index < end; index += 1) sum += values[index];
  return sum / (end - first);
}

const oneLine = (text) => text.replace(/\s+/g, " ");
