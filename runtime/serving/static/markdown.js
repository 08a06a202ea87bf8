/**
 * Markdown as DOM nodes: what models write of CommonMark and GitHub's tables, task lists and struck text. Line ends are
 * kept, as in other chats. Not supported, and shown as text, are HTML, indented code and references to links. Images
 * become links, because the page loads nothing from elsewhere.
 *
 * The libraries for this return HTML, which would need another library to make it safe; nodes cannot be unsafe.
 */
import { copyButton, element } from "./dom.js";

const sources = new WeakMap();

/** Shows a text in a container. Blocks of unchanged source keep their nodes, and with them selection and focus. */
export function show(container, text) {
  const found = blocks(text.split("\n"));
  found.forEach((block, index) => {
    const old = container.children[index];
    if (old && sources.get(old) === block.source) return;
    const node = block.build();
    sources.set(node, block.source);
    if (old?.open) node.open = true; // reasoning that the reader has opened
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > found.length) container.lastElementChild.remove();
}

/* Blocks. Each reader takes lines, the index of one, and the number of blocks around them, and returns null or
 * {end, build, open}: where its block ends, what makes its element, and what tells whether it ends with a paragraph,
 * which a following line would continue. */

const DEEPEST = 16; // models that have lost the thread write thousands of marks
const flat = [fence, heading, rule, table], readers = [...flat, thought, quote, list];

function blocks(lines, depth = 0) {
  const found = [];
  for (let start = 0; start < lines.length;) {
    if (!lines[start].trim()) {
      start++;
      continue;
    }
    const block = first(depth < DEEPEST ? readers : flat, lines, start, depth) ?? paragraph(lines, start);
    const source = lines.slice(start, block.end).join("\n");
    found.push({ ...block, source, isApart: start > 0 && !lines[start - 1].trim() });
    start = block.end;
  }
  return found;
}

function first(some, lines, start, depth) {
  for (const read of some) {
    const block = read(lines, start, depth);
    if (block) return block;
  }
  return null;
}

/** Whether a block begins here that ends a paragraph; of the numbered lists only those from 1, as in CommonMark. */
function interrupts(lines, start) {
  const item = itemAt(lines[start]);
  return item ? Boolean(item.rest) && !(item.number !== 1 && item.number >= 0)
    : first([...flat, thought, quote], lines, start, DEEPEST) !== null;
}

/** Whether a line without the marks of the quote or list above it continues the paragraph there. */
function continues(inner, lines, start, depth) {
  return inner.at(-1).trim() && !itemAt(lines[start]) && !interrupts(lines, start) && isOpen(inner, depth);
}

const isOpen = (lines, depth) => Boolean(blocks(lines, depth + 1).at(-1)?.open?.());
const nodes = (lines, depth) => blocks(lines, depth + 1).map(block => block.build());

/** The reasoning of a model that marks it. */
function thought(lines, start, depth) {
  if (!lines[start].startsWith("<think>")) return null;
  let end = start;
  while (end < lines.length && !lines[end].includes("</think>")) end++;
  const text = lines.slice(start, end + 1).join("\n").replace("<think>", "").replace("</think>", "\n");
  const build = () => element("details", {}, element("summary", {}, "Reasoning"), ...nodes(text.split("\n"), depth));
  return { end: Math.min(end + 1, lines.length), build };
}

function fence(lines, start) {
  const [, indent, marks, language] = lines[start].match(/^( {0,3})(`{3,}|~{3,})\s*(.*)$/) ?? [];
  if (!marks || (marks[0] === "`" && language.includes("`"))) return null;
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  let end = start + 1;
  while (end < lines.length && !closing.test(lines[end])) end++;
  const code = lines.slice(start + 1, end).map(line => unindented(line, indent.length)).join("\n");
  return { end: Math.min(end + 1, lines.length), build: () => codeBlock(language.split(/\s/)[0], code) };
}

function codeBlock(language, code) {
  const caption = element("figcaption", {}, element("span", {}, language), copyButton(() => code, "Copy code"));
  const shown = element("pre", { tabIndex: 0 }, element("code", {}, code));
  return element("figure", { className: "code" }, caption, shown);
}

function heading(lines, start) {
  const found = lines[start].match(/^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/);
  return found && { end: start + 1, build: () => headingNode(found[1].length, found[2] ?? "") };
}

/** Headings are two levels below their marks, because the page's name and the speaker's are above them. */
function headingNode(level, text) {
  return filled(element(`h${Math.min(level + 2, 6)}`), text);
}

function rule(lines, start) {
  return isRule(lines[start]) ? { end: start + 1, build: () => element("hr") } : null;
}

const isRule = line => /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/.test(line);

function quote(lines, start, depth) {
  const MARK = /^ {0,3}> ?/, inner = [];
  let end = start;
  for (; end < lines.length; end++) {
    if (MARK.test(lines[end])) inner.push(lines[end].replace(MARK, ""));
    else if (end > start && lines[end].trim() && continues(inner, lines, end, depth)) inner.push(lines[end]);
    else break;
  }
  const build = () => element("blockquote", {}, ...nodes(inner, depth));
  return inner.length ? { end, build, open: () => isOpen(inner, depth) } : null;
}

/** The list item that begins on a line, or null: its kind, its number if it has one, and its text's indentation. */
function itemAt(line) {
  const found = line.match(/^( {0,3})([-+*]|\d{1,9}[.)])([ \t]+|$)/);
  if (!found || isRule(line)) return null;
  const [all, indent, mark, space] = found, rest = line.slice(all.length);
  const gap = rest && space.length <= 4 ? space.length : 1;
  return { kind: mark.at(-1), number: parseInt(mark), width: indent.length + mark.length + gap, rest };
}

function list(lines, start, depth) {
  const head = itemAt(lines[start]), items = [];
  let isLoose = false, end = start;
  for (let next = start, item = head; item && item.kind === head.kind; item = itemAt(lines[next] ?? "")) {
    const inner = [item.rest];
    isLoose ||= next > end;
    for (next++; next < lines.length; next++) {
      const line = lines[next];
      if (!line.trim()) inner.push("");
      else if (indentOf(line) >= item.width) inner.push(unindented(line, item.width));
      else if (continues(inner, lines, next, depth)) inner.push(line.trimStart());
      else break;
    }
    end = next;
    for (; inner.length > 1 && !inner.at(-1); end--) inner.pop();
    items.push(inner);
  }
  isLoose ||= items.some(inner => blocks(inner, depth + 1).slice(1).some(block => block.isApart));
  const build = () => listNode(head, items.map(inner => itemNode(inner, isLoose, depth)));
  return head && { end, build, open: () => isOpen(items.at(-1), depth) };
}

function listNode(head, items) {
  return head.number >= 0 ? element("ol", { start: head.number }, ...items) : element("ul", {}, ...items);
}

function itemNode(inner, isLoose, depth) {
  const [, task, rest] = inner[0].match(/^\[([ xX])\] (.*)$/) ?? [];
  const content = nodes(task ? [rest, ...inner.slice(1)] : inner, depth);
  const inside = content.flatMap(each => each.tagName === "P" && !isLoose ? [...each.childNodes] : each);
  const node = element("li", {}, ...inside);
  if (task) {
    const checked = task !== " ", ariaLabel = checked ? "done" : "to do";
    node.className = "task";
    node.prepend(element("input", { type: "checkbox", disabled: true, checked, ariaLabel }), " ");
  }
  return node;
}

function table(lines, start) {
  const DELIMITERS = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
  if (!lines[start].includes("|") || !DELIMITERS.test(lines[start + 1] ?? "")) return null;
  const head = cells(lines[start]), sides = cells(lines[start + 1]).map(sideOf);
  if (head.length !== sides.length) return null;
  let end = start + 2;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  const row = (tag, texts) => element("tr", {}, ...sides.map((side, column) => {
    const cell = filled(element(tag), texts[column] ?? "");
    cell.style.textAlign = side;
    return cell;
  }));
  const build = () => {
    const body = lines.slice(start + 2, end).map(line => row("td", cells(line)));
    const node = element("table", {}, element("thead", {}, row("th", head)));
    if (body.length) node.append(element("tbody", {}, ...body));
    return element("div", { className: "table", tabIndex: 0 }, node);
  };
  return { end, build };
}

const cells = line => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  .map(cell => cell.trim().replaceAll("\\|", "|"));

const SIDES = { "": "", "l": "left", "r": "right", "lr": "center" };

const sideOf = cell => SIDES[(cell.startsWith(":") ? "l" : "") + (cell.endsWith(":") ? "r" : "")];

function paragraph(lines, start) {
  let end = start + 1;
  const text = () => lines.slice(start, end).map(line => line.trimStart()).join("\n").trimEnd();
  for (; end < lines.length && lines[end].trim(); end++) {
    const underline = lines[end].match(/^ {0,3}(=+|-+)\s*$/);
    if (underline) {
      const above = text();
      return { end: end + 1, build: () => headingNode(underline[1][0] === "=" ? 1 : 2, above) };
    }
    if (interrupts(lines, end)) break;
  }
  return { end, build: () => filled(element("p"), text()), open: () => true };
}

function indentOf(line) {
  let width = 0;
  for (const character of line.match(/^[ \t]*/)[0]) width += character === "\t" ? 4 - (width % 4) : 1;
  return width;
}

/** A line without its first columns, as far as they are blank. */
function unindented(line, width) {
  let index = 0, column = 0;
  for (; column < width && /[ \t]/.test(line[index] ?? ""); index++) {
    column += line[index] === "\t" ? 4 - (column % 4) : 1;
  }
  return " ".repeat(Math.max(column - width, 0)) + line.slice(index);
}

/* Text within blocks. */

const LABEL = String.raw`((?:[^[\]\\]|\\.|\[[^[\]]*\])*)`; // with brackets in it, but not in these
const ADDRESS = String.raw`(?:<([^<>\n]*)>|((?:[^\s()<>\\]|\\.|\([^\s()]*\))*))`;
const TITLE = String.raw`(?:\s+(?:"[^"]*"|'[^']*'))?`;

/** What may stand in a text, as a pattern and what it becomes: a text, an element, or a delimiter of emphasis. */
const spans = [
  [/\\([!-/:-@[-`{-~])/y, found => found[1]],
  [/ *\\?\n */y, () => element("br")],
  [/(`+)(?!`)([^]*?[^`])\1(?!`)/y, found => codeSpan(found[2])],
  [/`+/y, found => found[0]],
  [/<((?:https?:\/\/|mailto:)[^\s<>]+)>/y, found => bareLink(found[1])],
  [/(?<![\p{L}\p{N}])https?:\/\/(?:\([^\s<()]*\)|[^\s<()])*(?:\([^\s<()]*\)|[^\s<()?!.,:;*_~'"\]])/uy,
    found => bareLink(found[0])],
  [new RegExp(`!?\\[${LABEL}\\]\\(\\s*${ADDRESS}${TITLE}\\s*\\)`, "y"),
    found => link(unescaped(found[2] ?? found[3]), found[1] || found[2] || found[3], found[0])],
  [/\*+|_+|~~/y, delimiter],
  [/[^\\`<h![*_~\n ]+|[^]/y, found => found[0]],
];

const unescaped = text => text.replace(/\\([!-/:-@[-`{-~])/g, "$1");

/** Fills an element with a text's spans. */
function filled(node, text, isLink = false) {
  const parts = [];
  for (let at = 0; at < text.length;) {
    for (const [pattern, make] of spans) {
      pattern.lastIndex = at;
      const found = pattern.exec(text);
      if (!found) continue;
      const part = make(found);
      if (isLink && part.tagName === "A") parts.push(part.textContent);
      else if (typeof part === "string" && typeof parts.at(-1) === "string") parts[parts.length - 1] += part;
      else parts.push(part);
      at += found[0].length;
      break;
    }
  }
  emphasise(parts);
  node.append(...parts.map(shown));
  return node;
}

function codeSpan(text) {
  const line = text.replaceAll("\n", " ");
  return element("code", {}, /^ .*[^ ].* $/.test(line) ? line.slice(1, -1) : line);
}

/** A link to another place, in a new tab; the source instead, if the address is not one of the web or of mail. */
function link(address, text, source = text) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return source;
  return filled(element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }), text, true);
}

function bareLink(address) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, address);
}

/** Marks that may begin or end emphasis, by what is before and after them (CommonMark 0.31, section 6.2). */
function delimiter(found) {
  const mark = found[0][0], length = found[0].length, { input, index } = found;
  const before = input[index - 1] ?? " ", after = input[index + length] ?? " ";
  const [isSpaceBefore, isSpaceAfter] = [before, after].map(each => /\s/.test(each));
  const [isSignBefore, isSignAfter] = [before, after].map(each => /[\p{P}\p{S}]/u.test(each));
  const isLeft = !isSpaceAfter && (!isSignAfter || isSpaceBefore || isSignBefore);
  const isRight = !isSpaceBefore && (!isSignBefore || isSpaceAfter || isSignAfter);
  const isShort = length <= 3; // longer runs are lines, not emphasis
  const opens = isShort && isLeft && (mark !== "_" || !isRight || isSignBefore);
  const closes = isShort && isRight && (mark !== "_" || !isLeft || isSignAfter);
  return { mark, length, opens, closes, left: length };
}

const shown = part => part.mark ? part.mark.repeat(part.left) : part;

/** Whether two delimiters belong together, where lengths may not add up to a multiple of 3 if one could do both. */
function pairs(opener, closer) {
  if (!opener.opens || opener.mark !== closer.mark) return false;
  const isEither = opener.closes || closer.opens;
  return !isEither || (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

/** Replaces delimiters that belong together, and what is between them, by elements. */
function emphasise(parts) {
  for (let end = 0; end < parts.length; end++) {
    const closer = parts[end];
    if (!closer.closes) continue;
    const start = parts.findLastIndex((part, index) => index < end && pairs(part, closer));
    if (start < 0) continue;
    const opener = parts[start], count = Math.min(opener.left, closer.left, 2);
    const tag = opener.mark === "~" ? "s" : count === 2 ? "strong" : "em";
    const node = element(tag, {}, ...parts.slice(start + 1, end).map(shown));
    opener.left -= count;
    closer.left -= count;
    const kept = [opener, node, closer].filter(part => part.left !== 0);
    parts.splice(start, end - start + 1, ...kept);
    end = start + kept.length - (closer.left ? 2 : 1);
  }
}
