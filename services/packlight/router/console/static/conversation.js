// The turns of one conversation. Each has one answer, or two under comparison.

import { Answer } from "./answer.js";
import { el } from "./dom.js";
import { against, count } from "./format.js";
import { toOneScale } from "./readout.js";

const LONG = 600; // characters of a question beyond which it is folded

export class Conversation {
  constructor(server, log) {
    this.server = server;
    this.log = log;
    this.turns = [];
    this.salt = crypto.getRandomValues(new Uint32Array(2)).join("");
  }

  /** Asks `question` with each of `settings` in turn, so that none slows the other. `options` go into each body. */
  async ask(question, settings, options, system, signal) {
    const isComparison = settings.length > 1;
    const turn = { question, answers: new Map() };
    const lanes = el("div.lanes", { "data-lanes": settings.length });
    const article = el("article.turn", {}, shown(question), lanes);
    this.log.append(article);
    article.scrollIntoView({ block: "start" });
    for (const setting of settings) {
      const answer = new Answer(setting.name, setting.words, isComparison);
      turn.answers.set(setting.name, answer);
      lanes.append(answer.element);
    }
    for (const setting of settings) {
      const body = { ...options, kv: setting.kv, messages: this.#messages(setting.name, question, system) };
      // Two settings share a prefix cache unless they are kept apart; then the second would look faster than it is.
      if (isComparison) body.cache_salt = `${this.salt}-${setting.name}`;
      await turn.answers.get(setting.name).follow(this.server.chat(body, signal), signal);
    }
    this.turns.push(turn);
    if (isComparison) this.#compare(turn, lanes);
  }

  /** What was said so far, as `lane` has it: its own answers, the other's where it has none, and no empty ones. */
  #messages(lane, question, system) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const turn of this.turns) {
      const answer = turn.answers.get(lane) ?? [...turn.answers.values()].at(-1);
      if (!answer.text) continue;
      messages.push({ role: "user", content: turn.question }, { role: "assistant", content: answer.text });
    }
    return [...messages, { role: "user", content: question }];
  }

  #compare(turn, lanes) {
    const answers = [...turn.answers.values()];
    if (!answers.every((answer) => answer.isComplete)) return;
    toOneScale(answers.map((answer) => answer.element));
    linkStrips(lanes, answers);
    lanes.after(el("p.verdict", { role: "status" }, verdict(...answers)));
  }
}

/** Who points at one strip reads the same place on the other; where the conversations differ there is none. */
function linkStrips(lanes, answers) {
  const strips = answers.map((answer) => answer.strip).filter(Boolean);
  const others = (strip) => strips.filter((other) => other !== strip && other.numTokens === strip.numTokens);
  lanes.addEventListener("look", ({ detail: strip }) => others(strip).forEach((other) => other.show(strip.bin)));
  lanes.addEventListener("leave", ({ detail: strip }) => others(strip).forEach((other) => other.showTotals()));
}

function verdict(a, b) {
  const shipped = [b, a].map((answer) => answer.usage?.kv?.shipped_bytes);
  const weight = against(...shipped);
  return `${likeness(a.text, b.text)}${weight ? ` B shipped ${weight}.` : ""}`;
}

function likeness(a, b) {
  if (a === b) return "A and B gave the same answer.";
  let same = 0;
  while (same < a.length && a[same] === b[same]) same += 1;
  return same ? `A and B agree for ${same} characters, then differ.` : "A and B differ from the first character.";
}

function shown(question) {
  if (question.length <= LONG) return el("p.question", {}, question);
  const head = question.slice(0, 170).replace(/\s+\S*$/, "");
  const tail = question.slice(-170).replace(/^\S*\s+/, "");
  return el(
    "details.question",
    {},
    el(
      "summary",
      {},
      el("span.cut", {}, `${head} … ${tail}`),
      el("span.more", {}, `${count(question.length)} characters`),
    ),
    el("div.all", {}, question),
  );
}
