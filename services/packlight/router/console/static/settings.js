// One way to pack: the controls for a request's `kv` object, made from what the server says it can do.

import { el } from "./dom.js";
import { count, percent } from "./format.js";

const OWN = "";

export class Setting {
  /** `name` is "A" or "B"; `state` the server's settings; `recipe` the one to begin with. */
  constructor(name, state, recipe) {
    this.name = name;
    this.state = state;
    this.recipes = new Map(state.recipes.map((one) => [one.name, one]));
    this.recipe = select(["auto", ...this.recipes.keys()], recipe);
    this.size = select([
      [OWN, "recipe’s own"],
      ["ratio", "a share"],
      ["budget", "tokens"],
    ]);
    this.ratio = input("range", { id: `ratio-${name}`, min: 0.02, max: 1, step: 0.01, value: 0.25 }, "Share kept");
    this.shown = el("output");
    this.budget = input("number", { min: 1, step: 1, value: 512 }, "Tokens kept per KV head");
    this.codec = select([[OWN, "recipe’s own"], ...state.codecs]);
    this.about = el("p.about");
    this.element = this.#build();
    this.element.addEventListener("input", () => this.#refresh());
    this.#refresh();
  }

  /** The request's `kv` object. */
  get kv() {
    const kv = { recipe: this.recipe.value, explain: true };
    if (this.#isSized && this.size.value === "ratio") kv.ratio = Number(this.ratio.value);
    if (this.#isSized && this.size.value === "budget") kv.budget = Number(this.budget.value);
    if (this.codec.value !== OWN) kv.codec = this.codec.value;
    return kv;
  }

  /** What was asked for, in a few words. */
  get words() {
    const { recipe, ratio, budget, codec } = this.kv;
    const size = ratio ? percent(ratio) : budget ? `${count(budget)} tokens` : null;
    return [recipe, size, codec].filter(Boolean).join(" · ");
  }

  set isNamed(value) {
    this.tag.hidden = !value;
  }

  get #isSized() {
    return this.recipe.value === "auto" || this.recipes.get(this.recipe.value).has_budget;
  }

  #build() {
    const id = (part) => `${part}-${this.name}`;
    const row = (label, part, control) => {
      control.id = id(part);
      return el("div.pair", {}, el("label", { for: control.id }, label), control);
    };
    this.tag = el("b.tag", { "data-lane": this.name }, this.name);
    this.ratioRow = el("div.pair.size", {}, this.ratio, this.shown);
    this.budgetRow = row("Tokens per head", "budget", this.budget);
    return el(
      "fieldset.plain",
      { "data-setting": this.name },
      el("legend", {}, this.tag, "Packing"),
      row("Recipe", "recipe", this.recipe),
      row("Keep", "size", this.size),
      this.ratioRow,
      this.budgetRow,
      row("Codec", "codec", this.codec),
      this.about,
    );
  }

  #refresh() {
    const isSized = this.#isSized;
    this.size.disabled = !isSized;
    this.ratioRow.hidden = !isSized || this.size.value !== "ratio";
    this.budgetRow.hidden = !isSized || this.size.value !== "budget";
    this.shown.value = percent(this.ratio.value);
    this.about.textContent = this.recipe.value === "auto" ? this.#policy() : this.#method();
  }

  #method() {
    const recipe = this.recipes.get(this.recipe.value);
    const own = recipe.ratio ? ` Keeps ${percent(recipe.ratio)} unless told otherwise.` : "";
    return recipe.summary.replaceAll("`", "") + own;
  }

  #policy() {
    const rows = this.state.policy.rows.map(({ min_tokens: from, recipe, ratio }) => {
      const what = ratio ? `${recipe} ${percent(ratio)}` : recipe;
      return from ? `${what} from ${count(from)} tokens` : what;
    });
    return `Chooses by the prompt’s length: ${rows.join(", ")}.`;
  }
}

function input(type, attributes, label) {
  return el("input", { type, ...attributes, "aria-label": label });
}

/** Of values, or of [value, label] pairs. */
function select(options, value) {
  const made = options.map((option) => {
    const [key, label] = Array.isArray(option) ? option : [option, option];
    return el("option", { value: key, selected: key === value }, label);
  });
  return el("select", {}, ...made);
}
