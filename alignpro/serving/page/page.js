// The page: a prompt goes to the target as it is and rewritten, and both answers are shown as they come.
// Whatever comes from a model or a client is data: it is set as text, never as HTML.

import { RequestFailed, pieces, request } from "./api.js";
import { wordDiff } from "./diff.js";
import { showRequests } from "./recent.js";
import { rewriteOf, verdict } from "./rewrite.js";

const at = (id) => document.getElementById(id);
const token = () => at("token").value.trim();
let state = { runs: [], token: false, model: null, recent: null, rewards: false };
let running = null; // the AbortController of what is under way
let shown = null; // the prompt and the rewrite that the diff shows

function tell(problem) {
  at("problem").textContent = problem;
  at("problem").hidden = problem === "";
}

async function open() {
  try {
    state = await (await request("page/state")).json();
  } catch (error) {
    tell(error.message);
    return;
  }
  at("run").replaceChildren(...state.runs.map((run) => new Option(run, run)));
  at("run").disabled = state.runs.length === 0;
  if (state.runs.length === 0) {
    at("run").add(new Option("none is served", ""));
    tell("No run is served: prompts go to the target as they are.");
  }
  at("token-field").hidden = !state.token;
  at("recent").hidden = state.recent === null;
  at("admin-field").hidden = !state.recent?.token;
  if (!state.token) await listModels();
  await refresh();
}

async function listModels() {
  if (state.token && token() === "") return;
  let models = state.model === null ? [] : [state.model];
  if (models.length === 0) {
    try {
      const listed = await (await request("v1/models", { token: token() })).json();
      models = listed.data.map((model) => String(model.id));
    } catch (error) {
      tell(`The target's models cannot be listed, so write the name of one: ${error.message}`);
      return;
    }
  }
  tell("");
  at("models").replaceChildren(...models.map((model) => new Option(model, model)));
  if (models.length === 1 && at("model").value === "") at("model").value = models[0];
}

function conversation() {
  const messages = [];
  if (at("system").value.trim() !== "") messages.push({ role: "system", content: at("system").value });
  messages.push({ role: "user", content: at("prompt").value });
  const body = { model: at("model").value.trim(), messages, stream: true };
  if (at("temperature").value !== "") body.temperature = at("temperature").valueAsNumber;
  if (at("max-tokens").value !== "") body.max_tokens = at("max-tokens").valueAsNumber;
  return body;
}

/** The parts of the page that show one answer. */
function panel(id) {
  const part = (selector) => at(id).querySelector(selector);
  return { text: part(".answer"), facts: part(".facts"), problem: part(".problem") };
}

function clear({ text, facts, problem }) {
  text.textContent = facts.textContent = problem.textContent = "";
  problem.hidden = true;
  text.setAttribute("aria-busy", "true");
}

/** Ask for one answer and show it as it comes; returns its text, or null if it failed. */
async function answer(view, body, signal, begun = () => {}) {
  clear(view);
  const start = performance.now();
  const since = () => `${((performance.now() - start) / 1000).toFixed(2)} s`;
  let text = "";
  let first = null;
  try {
    const response = await request("v1/chat/completions", { token: token(), body, signal });
    begun(response.headers);
    for await (const piece of pieces(response)) {
      first ??= since();
      text += piece;
      view.text.append(piece);
    }
    view.facts.textContent = `First text after ${first ?? since()}, all after ${since()}`;
    if (text === "") view.facts.textContent = `Empty, after ${since()}`;
    return text;
  } catch (error) {
    if (error.name === "AbortError") view.facts.textContent = `Stopped after ${since()}`;
    else fail(view, error);
    return null;
  } finally {
    view.text.removeAttribute("aria-busy");
  }
}

function fail(view, error) {
  view.problem.textContent = error.message;
  view.problem.hidden = false;
  if (error instanceof RequestFailed && error.status === 401) at("token").focus();
}

function showRewrite(prompt, headers) {
  const rewrite = rewriteOf(headers);
  shown = rewrite === null ? null : { prompt, rewrite };
  at("verdict").textContent = verdict(headers);
  at("rewritten-title").textContent =
    headers.get("x-alignpro-rewrite") === "applied" ? "Answer to the rewrite" : "Answer with the proxy, not rewritten";
  at("rewrite").hidden = false;
  if (matchMedia("(max-width: 48rem)").matches) at("rewrite").scrollIntoView(); // it is below the form there
  drawRewrite();
}

function drawRewrite() {
  at("diff-area").hidden = shown === null;
  if (shown === null) return;
  const { prompt, rewrite } = shown;
  if (at("show-changes").checked) at("diff").replaceChildren(...wordDiff(prompt, rewrite).map(drawn));
  else at("diff").textContent = rewrite;
}

function drawn({ kind, text }) {
  if (kind === "same") return document.createTextNode(text);
  const element = document.createElement(kind === "added" ? "ins" : "del");
  const spoken = document.createElement("span"); // screen readers are silent about ins and del
  spoken.className = "spoken";
  spoken.textContent = ` [${kind}: `;
  const end = spoken.cloneNode();
  end.textContent = "] ";
  element.append(spoken, text, end);
  return element;
}

async function send() {
  if (running !== null) return;
  running = new AbortController();
  busy(true);
  tell("");
  at("rewrite").hidden = true;
  at("answers").hidden = false;
  at("status").textContent = "Asking…";
  const { signal } = running;
  const body = conversation();
  const prompt = at("prompt").value;
  const run = at("run").value;
  const own = run === "" ? { return: "header" } : { run, return: "header" };
  const views = [panel("original"), panel("rewritten")];
  const texts = await Promise.all([
    answer(views[0], { ...body, alignpro: { opt_out: true } }, signal),
    answer(views[1], { ...body, alignpro: own }, signal, (headers) => showRewrite(prompt, headers)),
  ]);
  at("status").textContent = signal.aborted ? "Stopped." : texts.includes(null) ? "An answer failed." : "Both answers are here.";
  if (state.rewards && run !== "" && !texts.includes(null)) await showRewards(views, { run, prompt, answers: texts }, signal);
  running = null;
  busy(false);
  await refresh();
}

async function showRewards(views, body, signal) {
  try {
    const { rewards } = await (await request("page/rewards", { token: token(), body, signal })).json();
    rewards.forEach((reward, i) => {
      const value = document.createElement("strong");
      value.textContent = `Reward ${Number(reward.toPrecision(4))}`;
      views[i].facts.prepend(value, " · ");
    });
    at("status").textContent = `Both answers are here, with rewards ${rewards.map((each) => Number(each.toPrecision(4))).join(" and ")}.`;
  } catch (error) {
    at("status").textContent = `Both answers are here. No reward: ${error.message}`;
  }
}

function busy(is) {
  const [off, on] = is ? [at("send"), at("stop")] : [at("stop"), at("send")];
  on.disabled = false;
  if (document.activeElement === off) on.focus({ preventScroll: true }); // a disabled button would lose it
  off.disabled = true;
}

async function refresh() {
  if (state.recent === null || (state.recent.token && at("admin-token").value === "")) return;
  try {
    const listed = await (await request("page/requests", { token: at("admin-token").value.trim() })).json();
    showRequests(at("requests"), listed.requests);
    at("recent-status").textContent = listed.requests.length === 0 ? "None yet." : "";
  } catch (error) {
    at("recent-status").textContent = error.message;
  }
  const texts = state.recent.texts ? "with their prompts and rewrites" : "without their texts";
  at("recent-note").textContent = `At most ${state.recent.kept} are kept in memory, ${texts}, newest first.`;
}

at("try").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("try").requestSubmit();
});
at("stop").addEventListener("click", () => running?.abort());
at("show-changes").addEventListener("change", drawRewrite);
at("token").addEventListener("change", listModels);
at("list").addEventListener("submit", (event) => {
  event.preventDefault();
  refresh();
});
open();
