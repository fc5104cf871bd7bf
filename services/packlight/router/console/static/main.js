// The console: what the server offers becomes controls, what is asked becomes a turn, the fleet is asked each second.

import { Server } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId } from "./dom.js";
import { FleetPanel } from "./fleet.js";
import { count } from "./format.js";
import { sample } from "./sample.js";
import { Setting } from "./settings.js";

const POLL_MS = 1000;

class Console {
  constructor() {
    this.server = new Server();
    this.fleet = new FleetPanel(byId("fleet"));
    this.model = null;
    this.running = null;
    this.#listen();
    this.#renew();
    this.#foldRails();
  }

  async start() {
    await this.#load();
    for (;;) {
      await this.#poll();
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  async #load() {
    try {
      this.#adopt(await this.server.get("console/state"));
      byId("key-form").hidden = true;
    } catch (error) {
      this.#trouble(error);
    }
  }

  #adopt(state) {
    this.model = state.model.name;
    const { num_layers: layers, num_kv_heads: heads, max_context: context } = state.model;
    const size = `${layers} layers × ${heads} KV heads · ${count(context)} tokens of context`;
    byId("model").textContent = `${this.model} · ${size}`;
    byId("max-tokens").max = context;
    this.settings = [new Setting("A", state, "none"), new Setting("B", state, state.default_recipe)];
    byId("settings").replaceChildren(...this.settings.map((setting) => setting.element));
    this.#showSettings();
    this.#enable();
  }

  async #poll() {
    if (document.hidden) return;
    if (!this.model) {
      if (byId("key-form").hidden) await this.#load();
      if (!this.model) return;
    }
    try {
      const fleet = await this.server.get("console/fleet");
      this.fleet.update(fleet, performance.now() / 1000);
      if (fleet.draining) this.#say("draining", "wait");
      else if (fleet.ready) this.#say("ready", "good");
      else this.#say(fleet.details.why_not ?? "not ready", "bad");
    } catch (error) {
      this.#trouble(error);
    }
  }

  async #ask() {
    const prompt = byId("prompt");
    const question = prompt.value.trim();
    if (!question || !this.model || this.running) return;
    byId("empty")?.remove();
    prompt.value = "";
    this.running = new AbortController();
    this.#enable();
    const settings = byId("compare").checked ? this.settings : this.settings.slice(-1);
    const system = byId("system").value.trim();
    try {
      await this.conversation.ask(question, settings, this.#options(), system, this.running.signal);
    } finally {
      this.running = null;
      this.#enable();
      prompt.focus();
    }
  }

  #options() {
    return {
      model: this.model,
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("max-tokens").value),
    };
  }

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#ask();
    });
    byId("prompt").addEventListener("input", () => this.#enable());
    byId("stop").addEventListener("click", () => this.running?.abort());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.running?.abort());
    byId("fresh").addEventListener("click", () => this.#renew());
    byId("compare").addEventListener("change", () => this.#showSettings());
    byId("sample").addEventListener("click", () => {
      byId("prompt").value = sample();
      byId("prompt").focus();
      this.#enable();
    });
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.server.key = byId("key").value.trim();
      byId("key").value = "";
      this.#load();
    });
  }

  #renew() {
    this.running?.abort();
    this.empty ??= byId("empty");
    byId("log").replaceChildren(this.empty);
    this.conversation = new Conversation(this.server, byId("log"));
    this.#enable();
  }

  #showSettings() {
    const isComparison = byId("compare").checked;
    const [first, second] = this.settings ?? [];
    if (!first) return;
    first.element.hidden = !isComparison;
    first.isNamed = second.isNamed = isComparison;
  }

  #enable() {
    const { length } = byId("prompt").value;
    byId("send").hidden = Boolean(this.running);
    byId("stop").hidden = !this.running;
    byId("send").disabled = !this.model || !length;
    byId("length").textContent = length > 200 ? `${count(length)} characters` : "";
  }

  /** On a narrow screen the conversation comes first. */
  #foldRails() {
    if (!matchMedia("(max-width: 760px)").matches) return;
    for (const rail of document.querySelectorAll(".rail")) rail.open = false;
  }

  #trouble(error) {
    if (error.status === 401) {
      byId("key-form").hidden = false;
      document.querySelector(".settings").open = true;
    }
    this.#say(error.message, "bad");
  }

  #say(text, state) {
    const status = byId("status");
    if (status.textContent !== text) status.textContent = text;
    status.dataset.state = state;
  }
}

new Console().start();
