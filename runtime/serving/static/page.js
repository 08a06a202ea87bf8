/** The chat page: what is shown, what is being answered, and what the controls do. */
import { announce, at } from "./dom.js";
import * as conversations from "./conversations.js";
import { showList } from "./list.js";
import * as server from "./server.js";
import * as settings from "./settings.js";
import * as talk from "./talk.js";

const SAVE_EVERY = 1000; // milliseconds, during an answer
const REMOVED = "removed"; // why an answer is stopped

const running = new Map(); // id of a conversation -> {conversation, controller} while it is answered
let current = conversations.create(), contextLength = 0;

/* What is shown. The address's fragment is the id of the conversation, so that the browser's back button works. */

function open(id) {
  current = running.get(id)?.conversation ?? conversations.find(id) ?? conversations.create();
  if (current.id !== id) history.replaceState(null, "", location.pathname);
  talk.showAll(current.messages, actions);
  at("notice").textContent = "";
  refresh();
}

/** Shows the list, the state of the button and the use of the context. */
function refresh() {
  showList(current, listActions);
  const isRunning = running.has(current.id);
  at("send").textContent = isRunning ? "Stop" : "Send";
  at("talk").classList.toggle("running", isRunning);
  showUse();
}

function showUse() {
  const timings = current.messages.findLast(message => message.timings)?.timings;
  const isKnown = Boolean(timings && contextLength);
  at("use").classList.toggle("known", isKnown);
  if (!isKnown) return;
  const used = timings.cache_n + timings.prompt_n + timings.predicted_n;
  Object.assign(at("context"), { max: contextLength, high: 0.9 * contextLength, optimum: 0, value: used });
  at("used").textContent = `${used} of ${contextLength} tokens of context`;
}

function keep(conversation) {
  try {
    conversations.save(conversation);
  } catch (error) {
    at("notice").textContent = error.message;
  }
}

async function showModel() {
  try {
    const model = await server.describeModel(settings.apiKey());
    document.title = at("name").textContent = model.id;
    contextLength = model.max_model_len;
    settings.showDefaults(model.sampling);
    at("notice").textContent = "";
    showUse();
  } catch (error) {
    at("notice").textContent = error.message;
  }
}

/* Answers. */

/** Returns what was said, without questions that got no answer, as a model may expect turns to alternate. */
function said(messages) {
  const isEmpty = message => message?.role === "assistant" && !message.content;
  return messages.filter((message, index) => !isEmpty(message) && !isEmpty(messages[index + 1]))
    .map(({ role, content }) => ({ role, content }));
}

/** Asks for an answer to a conversation and shows it as it comes. What has come until an error or "Stop" stays. */
async function answer(conversation) {
  const request = settings.request(said(conversation.messages));
  const message = { role: "assistant", content: "" }, controller = new AbortController();
  let saved = Date.now();
  running.set(conversation.id, { conversation, controller });
  conversation.messages.push(message);
  conversation.changed = saved;
  keep(conversation);
  if (conversation === current) talk.add(message, actions);
  at("announcer").replaceChildren();
  refresh();
  const draw = () => {
    if (conversation !== current) return;
    talk.update(message);
    talk.tell(message, !running.has(conversation.id));
    showUse();
  };
  const drawSoon = once(draw);
  try {
    for await (const piece of server.answer(request, settings.apiKey(), controller.signal)) {
      message.content += piece.text;
      message.timings = piece.timings ?? message.timings;
      drawSoon();
      if (Date.now() < saved + SAVE_EVERY) continue;
      keep(conversation);
      saved = Date.now();
    }
  } catch (error) {
    if (!controller.signal.aborted) message.error = error.message;
  }
  running.delete(conversation.id);
  if (controller.signal.reason === REMOVED) return; // and is not to be kept again
  keep(conversation);
  draw();
  refresh();
  if (controller.signal.aborted) announce("Stopped");
}

/** Returns a function that has an action done before the next drawing, however often it is called. */
function once(action) {
  let isPlanned = false;
  return () => {
    if (isPlanned) return;
    isPlanned = true;
    const run = () => {
      isPlanned = false;
      action();
    };
    if (document.hidden) setTimeout(run); // a hidden page is not drawn
    else requestAnimationFrame(run);
  };
}

function send() {
  const text = at("message").value;
  if (!text.trim() || running.has(current.id)) return;
  Object.assign(at("message"), { value: "", rows: 1 });
  say(text);
}

function say(text) {
  const message = { role: "user", content: text };
  current.messages.push(message);
  if (location.hash !== `#${current.id}`) history.pushState(null, "", `#${current.id}`);
  talk.add(message, actions);
  answer(current);
}

function stop() {
  running.get(current.id)?.controller.abort();
}

/** Drops a message and what followed it. */
function cut(message) {
  current.messages.splice(current.messages.indexOf(message));
  talk.showAll(current.messages, actions);
}

const actions = {
  edit(message, text) {
    if (running.has(current.id)) return;
    cut(message);
    say(text);
    write();
  },
  regenerate(message) {
    if (running.has(current.id)) return;
    cut(message);
    answer(current);
    write();
  },
};

/* The list. */

function go(id) {
  closeMenu();
  if (location.hash !== `#${id}`) history.pushState(null, "", `#${id}`);
  open(id);
  write();
}

const listActions = {
  open: conversation => go(conversation.id),
  rename(conversation, name) {
    const one = conversation.id === current.id ? current : running.get(conversation.id)?.conversation ?? conversation;
    one.name = name;
    keep(one);
    refresh();
  },
  remove(conversation) {
    running.get(conversation.id)?.controller.abort(REMOVED);
    conversations.remove(conversation);
    if (conversation.id === current.id) open("");
    else refresh();
    at("new").focus();
  },
};

/** Puts the cursor into the message, but not on a phone, where it would open the keyboard. */
function write() {
  if (matchMedia("(hover: hover)").matches) at("message").focus();
}

function closeMenu() {
  at("conversations").classList.remove("open");
  at("menu").ariaExpanded = "false";
}

/* Controls. */

at("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running.has(current.id)) stop();
  else send();
});
at("message").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("message").addEventListener("input", () => { // for browsers without CSS's field-sizing
  at("message").rows = Math.min(at("message").value.split("\n").length, 10);
});
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || at("dialog").open) return;
  if (at("conversations").classList.contains("open")) {
    closeMenu();
    at("menu").focus();
  } else {
    stop();
  }
});
at("new").addEventListener("click", () => {
  closeMenu();
  if (location.hash) history.pushState(null, "", location.pathname);
  open("");
  write();
});
at("menu").addEventListener("click", () => {
  const isOpen = at("conversations").classList.toggle("open");
  at("menu").ariaExpanded = String(isOpen);
  if (isOpen) at("new").focus();
});
at("talk").addEventListener("click", closeMenu);
addEventListener("popstate", () => open(location.hash.slice(1)));
addEventListener("pagehide", () => running.forEach(({ conversation }) => keep(conversation)));
addEventListener("storage", event => { // another tab has changed something
  if (event.key === conversations.keyOf(current.id) && !running.has(current.id)) open(current.id);
  else refresh();
});

settings.start(showModel);
open(location.hash.slice(1));
showModel();
write();
