/** The list of conversations at the side. */
import { at, button, element } from "./dom.js";
import { all, nameOf } from "./conversations.js";

/** Shows the list; `current` is the conversation shown, `actions` are open, rename and remove. */
export function showList(current, actions) {
  const entries = all().map(conversation => entry(conversation, conversation.id === current.id, actions));
  at("list").replaceChildren(...entries);
}

function entry(conversation, isCurrent, actions) {
  const name = nameOf(conversation);
  const open = button(name, () => actions.open(conversation));
  open.className = "open";
  open.dataset.id = conversation.id;
  if (isCurrent) open.ariaCurrent = "true";
  const node = element("li", {}, open);
  node.append(
    button("✎", () => rename(node, conversation, actions), `Rename ${name}`),
    button("×", () => {
      if (confirm(`Delete "${name}"?`)) actions.remove(conversation);
    }, `Delete ${name}`),
  );
  return node;
}

/** Puts a field in the place of a name, until Enter, Escape or the loss of the focus. */
function rename(node, conversation, actions) {
  const field = element("input", { value: nameOf(conversation), ariaLabel: "New name" });
  let hasEnded = false;
  const end = (name, isByKey) => {
    if (hasEnded) return;
    hasEnded = true;
    actions.rename(conversation, name);
    if (isByKey) at("list").querySelector(`[data-id="${conversation.id}"]`).focus();
  };
  field.addEventListener("keydown", event => {
    const isEnter = event.key === "Enter" && !event.isComposing;
    if (!isEnter && event.key !== "Escape") return;
    event.preventDefault(); // otherwise Enter would press what gets the focus, and Escape stop an answer
    event.stopPropagation();
    end(isEnter ? field.value.trim() : conversation.name, true);
  });
  field.addEventListener("blur", () => end(field.value.trim(), false));
  node.replaceChildren(field);
  field.select();
}
