// One answer as it comes: its text, what became of it, and then the readout.

import { el } from "./dom.js";
import { readout, stripOf } from "./readout.js";

export class Answer {
  /** `name` "A" or "B"; `words` what was asked for; `isNamed` where there are two. */
  constructor(name, words, isNamed) {
    this.text = "";
    this.usage = null;
    this.strip = null;
    this.isComplete = false;
    this.state = el("span.state", {}, "waiting");
    this.node = document.createTextNode("");
    this.body = el("div.text", { "aria-live": "polite", "aria-busy": "true" }, this.node);
    this.side = el("div.side");
    this.head = el(
      "header",
      {},
      isNamed ? el("b.tag", { "data-lane": name }, name) : null,
      el("span.asked", {}, words),
      this.state,
    );
    const label = isNamed ? `Answer ${name}` : "Answer";
    this.element = el("section.lane", { "aria-label": label }, this.head, this.body, this.side);
  }

  /** Reads `chunks` to their end. Raises nothing: what goes wrong is shown. */
  async follow(chunks, signal) {
    const started = performance.now();
    let [first, last] = [null, null];
    try {
      for await (const chunk of chunks) {
        const piece = chunk.choices[0]?.delta?.content;
        if (piece) {
          last = performance.now();
          first ??= last;
          this.#add(piece);
        }
        if (chunk.choices[0]?.finish_reason) this.ending = chunk.choices[0].finish_reason;
        this.usage = chunk.usage ?? this.usage;
      }
      this.isComplete = true;
      this.#end(this.ending === "length" ? "cut at the longest answer" : "complete");
    } catch (error) {
      this.#stop(error, signal);
    }
    if (this.usage) this.#measure(first === null ? null : (first - started) / 1000, (last - first) / 1000);
  }

  #add(piece) {
    if (!this.text) this.state.textContent = "answering";
    this.text += piece;
    this.node.appendData(piece);
  }

  #end(state) {
    this.state.textContent = state;
    this.body.setAttribute("aria-busy", "false");
  }

  #stop(error, signal) {
    if (signal.aborted) {
      this.#end("stopped");
      return;
    }
    this.#end("failed");
    this.element.classList.add("failed");
    this.body.after(el("p.fault", { role: "alert" }, error.message));
  }

  #measure(ttft_s, decode_s) {
    const { completion_tokens: num, kv } = this.usage;
    if (kv?.policy) this.head.querySelector(".asked").append(` → ${kv.recipe}`);
    this.strip = stripOf(this.usage);
    this.side.append(readout(this.usage, this.strip, { ttft_s, tpot_s: num > 1 ? decode_s / (num - 1) : null }));
  }
}
