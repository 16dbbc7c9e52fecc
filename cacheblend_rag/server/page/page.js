"use strict";

// ---- decisions: no document, no network --------------------------------------------------------

const SMALLEST = 500; // characters of a chunk: shorter paragraphs are joined
const LARGEST = 2400; // longer ones are split between sentences
const KINDS = ["prefix", "reused", "recomputed", "fresh", "missing", "other"];
const NAMES = {
  prefix: "prefix: in vLLM's own prefix cache",
  reused: "reused: stored KV",
  recomputed: "recomputed: of reused chunks",
  fresh: "fresh: nothing stored covers them",
  missing: "missing: stored KV that was gone or too slow",
  other: "other",
};
const KIND_OF = {
  prefix_cached: "prefix",
  reused: "reused",
  fresh: "fresh",
  missing: "missing",
  timed_out: "missing",
  timed_out: "missing",
};

/** A text as chunks of about a paragraph, in order; nothing but blank space is left out. */
function split(text) {
  const chunks = [];
  let open = "";
  for (const paragraph of text.replace(/\r\n?/g, "\n").split(/\n\s*\n/)) {
    for (const part of pieces(paragraph.trim())) {
      if (open && open.length + part.length > LARGEST) {
        chunks.push(open);
        open = "";
      }
      open = open ? `${open}\n\n${part}` : part;
      if (open.length >= SMALLEST) {
        chunks.push(open);
        open = "";
      }
    }
  }
  if (open) {
    chunks.push(open);
  }
  return chunks;
}

/** A paragraph in pieces of at most LARGEST characters, cut behind sentences, else behind words. */
function pieces(paragraph) {
  const found = [];
  let rest = paragraph;
  while (rest.length > LARGEST) {
    const room = rest.slice(0, LARGEST);
    const ends = [...room.matchAll(/[.!?。！？]["')\]]*\s*/g)].map((m) => m.index + m[0].length);
    const sentence = ends.filter((end) => end >= SMALLEST).pop();
    const word = room.lastIndexOf(" ") + 1;
    const cut = sentence || (word >= SMALLEST ? word : whole(rest, LARGEST));
    found.push(rest.slice(0, cut).trim());
    rest = rest.slice(cut).trim();
  }
  return rest ? [...found, rest] : found;
}

/** The place at or before `at` where no character is cut in two. */
function whole(text, at) {
  const code = text.charCodeAt(at - 1);
  return code >= 0xd800 && code < 0xdc00 ? at - 1 : at;
}

const words = (text) => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];

/** The chunks that share the rarest words with a question, at most `count`, the best one first. */
function retrieve(question, chunks, count) {
  const wanted = new Set(words(question));
  const bags = chunks.map((chunk) => new Set(words(chunk)));
  const weight = new Map();
  for (const word of wanted) {
    const holds = bags.filter((bag) => bag.has(word)).length;
    weight.set(word, holds ? Math.log(1 + chunks.length / holds) : 0);
  }
  const score = bags.map((bag) =>
    [...wanted].reduce((sum, word) => sum + (bag.has(word) ? weight.get(word) : 0), 0),
  );
  const order = chunks.map((_, i) => i).sort((a, b) => score[b] - score[a] || a - b);
  return order.slice(0, count).map((i) => chunks[i]);
}

/** The prompt's text: chunks as they were ingested, then the question. */
function promptOf(question, chunks) {
  return [...chunks, question.trim()].join("\n\n");
}

/** Bytes of a stream as they come to the JSON objects in it. */
class Events {
  constructor() {
    this.rest = "";
    this.decoder = new TextDecoder();
  }

  feed(bytes) {
    const lines = (this.rest + this.decoder.decode(bytes, { stream: true })).split("\n");
    this.rest = lines.pop();
    return lines
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trim())
      .filter((data) => data && data !== "[DONE]")
      .map((data) => JSON.parse(data));
  }
}

/** How many tokens of each kind a report has. */
function tally(report) {
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  for (const segment of report.segments) {
    const size = segment.end - segment.start;
    const again = segment.kind === "reused" ? segment.tokens_recomputed : 0;
    counts[KIND_OF[segment.kind] || "other"] += size - again;
    counts.recomputed += again;
  }
  return counts;
}

/** What a segment is called, and how many tokens it has. */
function labelOf(segment) {
  const size = segment.end - segment.start;
  const kind = KIND_OF[segment.kind] || segment.kind;
  const again = segment.kind === "reused" ? `, ${segment.tokens_recomputed} of them recomputed` : "";
  return `${kind}: ${size} ${size === 1 ? "token" : "tokens"}${again}`;
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

const share = (part, all) => (all ? `${((100 * part) / all).toFixed(1)} %` : "–");

/** A model as its hub or its folder names it. */
const modelName = (model) => (model.startsWith("/") ? model.split("/").pop() : model);

/** What both times say together. */
function verdict(fullMs, blendMs, report) {
  if (!report.blended) {
    return `Nothing was blended: ${report.detail || report.reason || "no reason was given"}`;
  }
  const times = fullMs / blendMs;
  return times >= 1
    ? `The blended answer began ${times.toFixed(1)} times sooner.`
    : `The blended answer began ${(1 / times).toFixed(1)} times later.`;
}

/** A random text that no other request has: its prompt finds nothing in vLLM's prefix cache. */
function salt() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page:${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

// ---- the server --------------------------------------------------------------------------------

const OURS = "v1/cacheblend";

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

class Server {
  constructor(key) {
    this.key = key;
  }

  async send(path, body, signal, method) {
    const headers = { "content-type": "application/json" };
    if (this.key()) {
      headers.authorization = `Bearer ${this.key()}`;
    }
    const how = method || (body === undefined ? "GET" : "POST");
    let response;
    try {
      response = await fetch(path, { method: how, headers, body: JSON.stringify(body), signal });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Refused(0, "The server can't be reached.");
    }
    if (!response.ok) {
      throw new Refused(response.status, await reasonOf(response));
    }
    return response;
  }

  async json(path, body, signal, method) {
    return (await this.send(path, body, signal, method)).json();
  }

  /** Streams an answer; returns its id and the milliseconds to its first token. */
  async answer(body, onText, signal) {
    const begin = performance.now();
    const response = await this.send("v1/completions", { ...body, stream: true }, signal);
    const reader = response.body.getReader();
    const events = new Events();
    let [id, first] = ["", null];
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return { id, ms: first };
      }
      for (const event of events.feed(value)) {
        if (event.error) {
          throw new Refused(500, event.error.message);
        }
        first ??= performance.now() - begin;
        id = event.id || id;
        onText(event.choices?.[0]?.text || "");
      }
    }
  }

  /** The token ids of a prompt: as a chat, or as text where the model has no chat template. */
  async tokenize(text, signal) {
    const path = `${OURS}/tokenize`;
    try {
      const messages = [{ role: "user", content: text }];
      return (await this.json(path, { prompt: messages }, signal)).token_ids;
    } catch (error) {
      if (error.status !== 400) {
        throw error;
      }
      return (await this.json(path, { prompt: text }, signal)).token_ids;
    }
  }

  async report(id, signal) {
    for (let left = 5; ; left -= 1) {
      try {
        return await this.json(`${OURS}/requests/${encodeURIComponent(id)}`, undefined, signal);
      } catch (error) {
        if (error.status !== 404 || !left) {
          throw error;
        }
        await wait(100);
      }
    }
  }
}

async function reasonOf(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return error.message || String(error);
  } catch {
    return text.slice(0, 300) || response.statusText;
  }
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// ---- the page ----------------------------------------------------------------------------------

const chunks = []; // of all documents ingested from here
let server;

const $ = (id) => document.getElementById(id);

function element(name, content, className) {
  const made = document.createElement(name);
  made.textContent = content;
  made.className = className || "";
  return made;
}

function complain(error) {
  $("alert").hidden = false;
  $("alert").textContent = error.message;
  if (error.status === 401) {
    $("alert").textContent = "This server wants an API key. Its field is at the end of the page.";
    $("key").focus();
  }
}

/** Runs what a button stands for: one at a time, can be stopped, and says what went wrong. */
async function running(start, stop, work) {
  const control = new AbortController();
  const end = () => control.abort();
  $("alert").hidden = true;
  start.disabled = true;
  stop.hidden = false;
  stop.addEventListener("click", end);
  try {
    await work(control.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      complain(error);
    }
  } finally {
    stop.removeEventListener("click", end);
    stop.hidden = true;
    start.disabled = false;
  }
}

async function showState() {
  try {
    const state = await server.json(OURS);
    $("about").textContent = `${modelName(state.model)}, ${aboutBlending(state.blending)}`;
    const rows = { "chunks stored": state.chunks ?? "not known", ...state.store };
    $("store").replaceChildren(
      ...Object.entries(rows).flatMap(([name, value]) => [
        element("dt", name.replaceAll("_", " ")),
        element("dd", typeof value === "number" ? value.toLocaleString("en") : String(value)),
      ]),
    );
    return state;
  } catch (error) {
    complain(error);
    return null;
  }
}

const aboutBlending = ({ on, detail, reason }) =>
  on ? "blending is on" : `blending is off: ${detail || reason}`;

async function ingestFiles(files) {
  await running($("files"), $("stop-ingestion"), async (signal) => {
    for (const file of files) {
      await ingestFile(file, signal);
    }
  });
  $("progress").hidden = true;
  $("files").value = "";
  await showState();
}

async function ingestFile(file, signal) {
  const parts = split(await file.text());
  if (!parts.length) {
    throw new Error(`${file.name} has no text.`);
  }
  const state = await showState();
  const behind = state?.config?.ingest_prefix === "document";
  const rows = parts.map((text, i) => ({
    text,
    document: file.name,
    ...(behind && i ? { left_context: parts[i - 1] } : {}),
  }));
  // not given up half way: what was begun would go on, and nobody would know its id
  let job = await server.json(`${OURS}/ingestions`, { chunks: rows });
  try {
    signal.throwIfAborted();
    while (job.status === "queued" || job.status === "in_progress") {
      showJob(file.name, job);
      await wait(200);
      job = await server.json(`${OURS}/ingestions/${job.id}`, undefined, signal);
    }
  } catch (error) {
    await server.json(`${OURS}/ingestions/${job.id}/cancel`, {}).catch(() => {});
    throw error;
  }
  showJob(file.name, job);
  if (job.status === "failed") {
    throw new Error(`${file.name}: ${job.error?.message || "the ingestion failed"}`);
  }
  chunks.push(...parts.filter((part) => !chunks.includes(part)));
  $("documents").append(element("li", `${file.name}: ${parts.length} chunks`));
}

function showJob(name, job) {
  const { total, remaining, computed, present, too_short, too_long } = job.counts;
  $("progress").hidden = false;
  $("progress").max = total;
  $("progress").value = total - remaining;
  const useless = too_short + too_long ? `, ${too_short + too_long} too short or too long` : "";
  const why = job.reason ? ` Nothing was stored: ${job.detail || job.reason}` : "";
  $("ingestion").textContent =
    `${name}: ${job.status.replace("_", " ")}, ${total - remaining} of ${total} chunks; ` +
    `${computed} computed, ${present} stored before${useless}.${why}`;
}

async function ask() {
  const question = $("question").value;
  const found = retrieve(question, chunks, Number($("count").value));
  for (const side of ["full", "blend"]) {
    $(`${side}-ttft`).textContent = "–";
    $(`${side}-answer`).textContent = "";
  }
  $("verdict").textContent = "";
  await running($("send"), $("stop"), async (signal) => {
    const ids = await server.tokenize(promptOf(question, found), signal);
    const common = { prompt: ids, max_tokens: Number($("tokens").value), temperature: 0 };
    // one after the other: beside each other they would slow each other down
    say(`Full prefill of ${ids.length} tokens.`);
    const off = { ...common, cache_salt: salt(), kv_transfer_params: { cacheblend: { mode: "off" } } };
    const full = await streamInto("full", off, signal);
    say("Blended.");
    const options = { mode: "blend", recompute_ratio: Number($("ratio").value) };
    const on = { ...common, kv_transfer_params: { cacheblend: options } };
    const blended = await streamInto("blend", on, signal);
    const report = await server.report(blended.id, signal);
    $("verdict").textContent = verdict(full.ms, blended.ms, report);
    await showReport(report, ids, signal);
    say("Both answers are here.");
  });
  await showState();
}

const say = (text) => {
  $("progress-of-answers").textContent = text;
};

async function streamInto(side, body, signal) {
  const node = document.createTextNode("");
  $(`${side}-answer`).replaceChildren(node);
  const answer = await server.answer(body, (text) => node.appendData(text), signal);
  $(`${side}-ttft`).textContent = seconds(answer.ms);
  return answer;
}

async function showReport(report, ids, signal) {
  const counts = tally(report);
  const shown = KINDS.filter((kind) => counts[kind] || kind !== "other");
  $("bar").replaceChildren(
    ...shown.filter((kind) => counts[kind]).map((kind) => {
      const part = element("span", "", kind);
      part.style.flexGrow = counts[kind];
      part.dataset.tokens = counts[kind];
      return part;
    }),
  );
  const said = shown.map((kind) => `${counts[kind]} ${kind}`).join(", ");
  $("bar").setAttribute("aria-label", `Of ${report.tokens_total} tokens: ${said}`);
  $("legend").replaceChildren(...shown.map((kind) => legendRow(kind, counts[kind], report)));
  $("total").textContent = report.tokens_total;
  $("why").textContent = report.detail || "";
  const texts = await Promise.all(
    report.segments.map(({ start, end }) =>
      server.json("detokenize", { tokens: ids.slice(start, end) }, signal),
    ),
  );
  $("prompt").replaceChildren(
    ...report.segments.map((segment, i) => segmentRow(segment, texts[i].prompt)),
  );
}

function legendRow(kind, count, report) {
  const row = document.createElement("tr");
  const head = element("th", "");
  head.scope = "row";
  head.append(element("span", "", `swatch ${kind}`), NAMES[kind]);
  row.dataset.kind = kind;
  row.append(head, element("td", count), element("td", share(count, report.tokens_total)));
  return row;
}

function segmentRow(segment, text) {
  const row = element("li", "", KIND_OF[segment.kind] || "other");
  row.append(element("span", labelOf(segment), "label"), element("span", text, "text"));
  row.title = segment.detail;
  return row;
}

function start() {
  server = new Server(() => $("key").value.trim());
  $("files").addEventListener("change", () => ingestFiles([...$("files").files]));
  const drop = $("drop");
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => ingestFiles([...event.dataTransfer.files]));
  $("ratio").addEventListener("input", () => {
    $("ratio-shown").textContent = Number($("ratio").value).toFixed(2);
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("refresh").addEventListener("click", showState);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("alert").hidden = true;
    showState();
  });
  showState();
}

if (typeof document === "undefined") {
  module.exports = { Events, labelOf, modelName, pieces, promptOf, retrieve, seconds, split, tally, verdict };
} else {
  start();
}
