// Elements, always with text as text: what a model wrote is never markup here.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function el(name, className = "", text = null) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== null) node.textContent = text;
  return node;
}

export function svg(name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

// Write only what has changed: most of a screen stays as it is from one message to the next.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setClass(node, className) {
  if (node.getAttribute("class") !== className) node.setAttribute("class", className);
}

// Pairs of a description list; each is [term, value, class].
export function describe(list, pairs) {
  while (list.children.length > pairs.length) list.lastChild.remove();
  pairs.forEach(([term, value, className = ""], i) => {
    const pair = list.children[i] ?? list.appendChild(el("div"));
    if (!pair.children.length) pair.append(el("dt"), el("dd"));
    setClass(pair, className);
    setText(pair.children[0], term);
    setText(pair.children[1], value);
  });
}
