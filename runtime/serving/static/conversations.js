/**
 * The conversations that this browser keeps, each under a key of its own, so that several tabs do not overwrite each
 * other's. A conversation is {id, name, changed, messages}; a message is {role, content}, and an answer also has
 * {timings, error} where there were any.
 */

const PREFIX = "llama-pte.conversation.", LONGEST_NAME = 60;

export function create() {
  // not crypto.randomUUID, which pages that came over plain HTTP from another machine do not have
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, name: "", changed: 0, messages: [] };
}

/** Returns all conversations, the latest first. */
export function all() {
  const keys = Object.keys(localStorage).filter(key => key.startsWith(PREFIX));
  return keys.map(key => JSON.parse(localStorage.getItem(key))).sort((one, other) => other.changed - one.changed);
}

export const keyOf = id => PREFIX + id;

export const find = id => JSON.parse(localStorage.getItem(keyOf(id)));

export const remove = conversation => localStorage.removeItem(keyOf(conversation.id));

/** Keeps a conversation. The browser's limit, about 5 million characters, is told as an error. */
export function save(conversation) {
  try {
    localStorage.setItem(keyOf(conversation.id), JSON.stringify(conversation));
  } catch {
    throw new Error("the browser has no room to keep this conversation; delete others");
  }
}

/** Returns the name it was given, or the beginning of its first message. */
export function nameOf(conversation) {
  const beginning = conversation.messages[0]?.content.trim().split("\n")[0].slice(0, LONGEST_NAME);
  return conversation.name || beginning || "New chat";
}
