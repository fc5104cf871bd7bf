// Making elements. Text always becomes a text node: nothing a model or a user wrote is ever read as markup.

/** An element of `kind`: "tag" or "tag.class.class". `attributes` that are null or false are left out. */
export function el(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Redraws `draw` when `node` changes its size, and when the colours change with the system's. */
export function keepDrawn(node, draw) {
  new ResizeObserver(draw).observe(node);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** A canvas context in CSS pixels, cleared, and how many device pixels one of them takes. Null while it has no size. */
export function clearedContext(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return null;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(canvas.width / width, canvas.height / height);
  return { context, width, height, scale };
}

export const colour = (node, name) => getComputedStyle(node).getPropertyValue(name).trim();
