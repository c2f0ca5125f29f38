// The list of the last requests.

/**
 * Show requests.
 * @param {HTMLElement} list
 * @param {object[]} requests As /page/requests gives them, the newest first.
 */
export function showRequests(list, requests) {
  list.replaceChildren(...requests.map(entry));
}

function entry(request) {
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.dateTime = request.time;
  time.textContent = new Date(request.time).toLocaleTimeString();
  const facts = [request.path, request.status === 0 ? "the client left" : `status ${request.status}`];
  if (request.rewrite) facts.push(request.rewrite + (request.run ? ` by ${request.run}` : ""));
  if (request.model) facts.push(request.model);
  facts.push(`${Math.round(request.ms)} ms`);
  if (request.tokens) facts.push(`${request.tokens} tokens`);
  if (request.error) facts.push(request.error);
  item.append(time, ` · ${facts.join(" · ")}`);
  add(item, "Prompt", request.prompt_text);
  add(item, "Rewrite", request.rewrite_text);
  return item;
}

function add(item, name, text) {
  if (typeof text !== "string") return;
  const line = document.createElement("p");
  line.className = "text";
  const label = document.createElement("strong");
  label.textContent = `${name}: `;
  line.append(label, text);
  item.append(line);
}
