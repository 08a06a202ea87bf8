/** The messages of the conversation that is shown. */
import { announce, at, button, copyButton, element } from "./dom.js";
import { show } from "./markdown.js";

const views = new WeakMap();
const talk = at("talk");

/** Shows a conversation's messages in place of others; `actions` are what their buttons do: edit and regenerate. */
export function showAll(messages, actions) {
  talk.replaceChildren();
  if (!messages.length) talk.append(element("p", { id: "empty" }, "Write a message to begin."));
  for (const message of messages) add(message, actions);
  talk.scrollTop = talk.scrollHeight;
}

/** Shows a new message below the others. */
export function add(message, actions) {
  at("empty")?.remove();
  const isOwn = message.role === "user", view = {
    body: element("div", { className: "body" }),
    error: element("p", { className: "error", role: "alert" }),
    numbers: element("span", { className: "numbers" }),
    told: 0,
  };
  const change = isOwn ? button("Edit", () => edit(message, view, actions), "Edit message")
    : button("Regenerate", () => actions.regenerate(message), "Regenerate answer");
  change.classList.add("change", isOwn ? "edit" : "regenerate");
  const copy = copyButton(() => message.content, isOwn ? "Copy message" : "Copy answer");
  view.foot = element("footer", {}, copy, change, ...(isOwn ? [] : [view.numbers]));
  const speaker = element("h2", { className: "unseen" }, isOwn ? "You" : "Answer");
  const parts = [speaker, view.body, view.error, view.foot];
  views.set(message, view);
  talk.append(element("article", { className: `message ${message.role}` }, ...parts));
  update(message);
  talk.scrollTop = talk.scrollHeight;
}

/** Shows what a message has become, and keeps the end in sight unless the reader has scrolled up. */
export function update(message) {
  const view = views.get(message), isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  if (message.role === "user") view.body.textContent = message.content;
  else show(view.body, message.content);
  view.error.textContent = message.error ?? "";
  view.numbers.textContent = message.timings ? numbers(message.timings) : "";
  if (isAtEnd) talk.scrollTop = talk.scrollHeight;
}

/** Has a screen reader say the blocks of an answer that are new and complete; all if the answer has ended. */
export function tell(message, hasEnded) {
  const view = views.get(message), blocks = [...view.body.children];
  const complete = hasEnded ? blocks.length : blocks.length - 1;
  for (; view.told < complete; view.told++) {
    const block = blocks[view.told];
    announce((block.querySelector("pre") ?? block).textContent);
  }
}

function numbers(timings) {
  const speed = value => value >= 100 ? value.toFixed(0) : value.toFixed(1);
  const parts = [`${timings.predicted_n} tokens`];
  if (timings.predicted_per_second) parts.push(`${speed(timings.predicted_per_second)} tokens/s`);
  const cached = timings.cache_n ? ` (${timings.cache_n} cached)` : "";
  parts.push(`prompt ${timings.cache_n + timings.prompt_n} tokens${cached}`);
  if (timings.prompt_per_second) parts.push(`${speed(timings.prompt_per_second)} tokens/s`);
  return parts.join(" · ");
}

/** Puts a field in the place of one's own message; sending it drops what followed and asks again. */
function edit(message, view, actions) {
  const field = element("textarea", { value: message.content, rows: 3, ariaLabel: "Edited message" });
  const end = () => {
    view.body.replaceChildren(message.content);
    view.foot.hidden = false;
  };
  const cancel = () => {
    end();
    view.foot.querySelector(".edit").focus();
  };
  const send = () => {
    if (!field.value.trim()) return;
    end();
    actions.edit(message, field.value);
  };
  field.addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
  });
  const resend = button("Send", send, "Send edited message");
  resend.className = "main";
  view.body.replaceChildren(field, element("footer", {}, resend, button("Cancel", cancel, "Cancel editing")));
  view.foot.hidden = true;
  field.focus();
}
