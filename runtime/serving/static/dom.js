/** What the page's modules build nodes with. Text is only ever put into text nodes, never parsed as HTML. */

export const at = id => document.getElementById(id);

/** Makes an element from its properties, or attributes where there is no such property, and its children. */
export function element(tag, values = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(values)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Makes a button; its label, if given, is what a screen reader says in place of its text. */
export function button(text, action, label = text) {
  const node = element("button", { type: "button", ariaLabel: label, title: label }, text);
  node.addEventListener("click", () => action(node));
  return node;
}

/** Makes a button that copies a text and says so. */
export function copyButton(text, label) {
  return button("Copy", async node => {
    await copy(text());
    node.textContent = "Copied";
    announce("Copied");
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  }, label);
}

/** Has a screen reader say a text. */
export function announce(text) {
  at("announcer").append(element("p", {}, text));
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const held = element("textarea", { value: text }); // for pages that came over plain HTTP from another machine
  const focused = document.activeElement;
  document.body.append(held);
  held.select();
  document.execCommand("copy");
  held.remove();
  focused?.focus();
}
