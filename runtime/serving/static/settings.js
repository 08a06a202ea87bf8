/** The settings of requests, which the browser keeps; the API key only until the tab is closed. */
import { at } from "./dom.js";

const KEPT = "llama-pte.settings", API_KEY = "llama-pte.key";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const FIELDS = ["system", ...NUMBERS];

export const apiKey = () => at("key").value.trim();

/** Returns the parameters of a request that answers messages; those that are not set are left to the model. */
export function request(messages) {
  const system = at("system").value.trim();
  const set = NUMBERS.filter(name => at(name).value !== "" && at(name).validity.valid);
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    ...Object.fromEntries(set.map(name => [name, at(name).valueAsNumber])),
  };
}

/** Shows in the empty fields what the model does by default. */
export function showDefaults(sampling) {
  for (const name of NUMBERS) if (name in sampling) at(name).placeholder = sampling[name];
}

/** Makes the dialog work; `keyChanged` is called when it closes with another API key. */
export function start(keyChanged) {
  const dialog = at("dialog"), kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  for (const name of FIELDS) at(name).value = kept[name] ?? "";
  at("key").value = sessionStorage.getItem(API_KEY) ?? "";
  const keep = () => {
    localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(FIELDS.map(name => [name, at(name).value]))));
  };
  at("settings").addEventListener("click", () => dialog.showModal());
  at("choices").addEventListener("input", keep);
  at("choices").addEventListener("submit", event => {
    event.preventDefault();
    dialog.close();
  });
  at("defaults").addEventListener("click", () => {
    for (const name of FIELDS) at(name).value = "";
    keep();
  });
  dialog.addEventListener("close", () => {
    if (apiKey() === (sessionStorage.getItem(API_KEY) ?? "")) return;
    sessionStorage.setItem(API_KEY, apiKey());
    keyChanged();
  });
}
