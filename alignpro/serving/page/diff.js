// Which words a rewrite keeps, removes and adds: the longest common subsequence of words and the space between them.

const MOST_CELLS = 4_000_000; // of the table; beyond it, all is removed and added

/**
 * Pieces of two texts in order.
 * @param {string} before
 * @param {string} after
 * @returns {{kind: "same" | "removed" | "added", text: string}[]} Neighbours are of different kinds.
 */
export function wordDiff(before, after) {
  const a = words(before);
  const b = words(after);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const pieces = [];
  add(pieces, "same", a.slice(0, start));
  middle(pieces, a.slice(start, a.length - end), b.slice(start, b.length - end));
  add(pieces, "same", a.slice(a.length - end));
  return pieces;
}

function words(text) {
  return text.match(/\s+|[\p{L}\p{M}\p{N}_'’-]+|[^\s]/gu) ?? [];
}

function add(pieces, kind, tokens) {
  const text = tokens.join("");
  if (text === "") return;
  const last = pieces[pieces.length - 1];
  if (last !== undefined && last.kind === kind) last.text += text;
  else pieces.push({ kind, text });
}

function middle(pieces, a, b) {
  if (a.length * b.length > MOST_CELLS) {
    add(pieces, "removed", a);
    add(pieces, "added", b);
    return;
  }
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width); // of a[i:] and b[j:]; at most 2000 of either fit in the table
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] =
        a[i] === b[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  let removed = [];
  let added = [];
  const flush = () => {
    add(pieces, "removed", removed);
    add(pieces, "added", added);
    removed = [];
    added = [];
  };
  let i = 0;
  let j = 0;
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      flush();
      add(pieces, "same", [a[i]]);
      i++;
      j++;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) removed.push(a[i++]);
    else added.push(b[j++]);
  }
  removed.push(...a.slice(i));
  added.push(...b.slice(j));
  flush();
}
