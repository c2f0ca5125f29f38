// What became of a prompt, from the headers of the answer, in words.

const REASONS = {
  opt_out: "the request asked for it",
  no_run: "no run is served",
  unknown_run: "the run is not served any more",
  canary: "this user is not in the share whose prompts are rewritten",
  shadow: "the proxy is in shadow mode",
  deadline: "the prompter was too late",
  queue_full: "the prompter has too much to do",
  engine_failed: "the prompter has failed",
  error: "rewriting failed; the proxy's log says why",
  closed: "the proxy stops",
  empty: "the rewrite is empty",
  truncated: "the rewrite reached its limit of tokens",
  unchanged: "the prompter keeps it as it is",
  too_long: "the prompt is longer than the proxy rewrites",
  encoding: "the text cannot be replaced in the request",
  no_user_text: "the last message has no text of a user",
  several_texts: "the last message has several texts",
  refused: "the prompter cannot have this prompt",
};
const GUARDS = {
  language_change: "the rewrite is in another language",
  length_ratio: "the rewrite is much shorter or longer",
  numbers_kept: "the rewrite loses a number",
  names_kept: "the rewrite loses a name",
  code_kept: "the rewrite changes code",
  embedding_similarity: "the rewrite means something else",
  copy_rate: "the rewrite copies too little or too much",
};

/** The rewrite; null if the answer brings none. */
export function rewriteOf(headers) {
  const value = headers.get("x-alignpro-rewritten");
  return value === null ? null : decodeURIComponent(value);
}

/** A sentence on whether the prompt was rewritten, by which run, and how long it took. */
export function verdict(headers) {
  const told = headers.get("x-alignpro-rewrite") ?? "";
  const run = decodeURIComponent(headers.get("x-alignpro-run") ?? "");
  const by = run === "" ? "" : ` by ${run}`;
  const took = ` (${headers.get("x-alignpro-ms")} ms)`;
  if (told === "applied") {
    const whole = headers.has("x-alignpro-rewritten") ? "" : " It is too long to be shown here.";
    return `Rewritten${by}${took}.${whole}`;
  }
  const reason = told.replace(/^skipped:/, "");
  const guard = reason.startsWith("guard:") ? reason.slice("guard:".length) : null;
  const why = guard === null ? (REASONS[reason] ?? reason) : (GUARDS[guard] ?? `the guard ${guard}`);
  const unused = headers.has("x-alignpro-rewritten") ? " The rewrite that was not used:" : "";
  return `Your prompt went as it is: ${why}${took}.${unused}`;
}
