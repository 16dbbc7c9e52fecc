// Run by test_page.py: the page's decisions, without a browser.
"use strict";

const { test } = require("node:test");
const assert = require("node:assert/strict");
const page = require("../../cacheblend_rag/server/page/page.js");

const paragraph = (n, words = 100) => `${n} ` + "word ".repeat(words).trim() + ".";

test("paragraphs become chunks, and nothing is lost", () => {
  const text = [1, 2, 3].map((n) => paragraph(n, 150)).join("\r\n\r\n");
  assert.deepEqual(page.split(text), [1, 2, 3].map((n) => paragraph(n, 150)));
});

test("short paragraphs are joined", () => {
  const chunks = page.split(Array.from({ length: 12 }, (_, n) => `Line ${n}.`).join("\n\n"));
  assert.equal(chunks.length, 1);
  assert.match(chunks[0], /^Line 0\.\n\nLine 1\./);
});

test("long paragraphs are cut behind sentences, and else behind words or characters", () => {
  const sentences = Array.from({ length: 200 }, (_, n) => `This is sentence ${n}.`).join(" ");
  for (const text of [sentences, "word ".repeat(3000).trim(), "😀".repeat(5000)]) {
    const parts = page.pieces(text);
    assert.ok(parts.every((part) => part.length <= 2400 && part.isWellFormed()));
    assert.equal(parts.join("").replace(/ /g, ""), text.replace(/ /g, ""));
  }
  assert.ok(page.pieces(sentences).every((part) => part.endsWith(".")));
});

test("no text, no chunks", () => {
  assert.deepEqual(page.split(" \n\n \n"), []);
});

test("the chunks that share rare words with the question come first", () => {
  const chunks = ["the ship of the line", "the harbour", "the Überfahrt of the ship", "the end"];
  assert.deepEqual(page.retrieve("Die ÜBERFAHRT of the ship?", chunks, 2), [chunks[2], chunks[0]]);
  assert.equal(page.retrieve("nothing", chunks, 3).length, 3);
});

test("a prompt holds its chunks as they were ingested", () => {
  assert.equal(page.promptOf(" Where? ", ["a", "b"]), "a\n\nb\n\nWhere?");
});

test("events come whole wherever bytes are cut", () => {
  const events = [{ id: "1", text: "é\u2028\u0085😀" }, { id: "2" }];
  const data = events.map((event) => `data: ${JSON.stringify(event)}\n\n`).join("");
  const bytes = new TextEncoder().encode(`: comment\n\n${data}data: [DONE]\n\n`);
  for (let size = 1; size < 30; size += 1) {
    const decoder = new page.Events();
    const got = [];
    for (let i = 0; i < bytes.length; i += size) {
      got.push(...decoder.feed(bytes.slice(i, i + size)));
    }
    assert.deepEqual(got, events);
  }
});

test("the tally adds up to the prompt", () => {
  const segments = [
    { start: 0, end: 10, kind: "prefix_cached", tokens_recomputed: 0 },
    { start: 10, end: 60, kind: "reused", tokens_recomputed: 8 },
    { start: 60, end: 65, kind: "fresh", tokens_recomputed: 0 },
    { start: 65, end: 80, kind: "missing", tokens_recomputed: 0 },
    { start: 80, end: 90, kind: "timed_out", tokens_recomputed: 0 },
    { start: 90, end: 91, kind: "of a later version", tokens_recomputed: 0 },
  ];
  const counts = page.tally({ segments });
  const expected = { prefix: 10, reused: 42, recomputed: 8, fresh: 5, missing: 25, other: 1 };
  assert.deepEqual(counts, expected);
  assert.equal(page.labelOf(segments[1]), "reused: 50 tokens, 8 of them recomputed");
  assert.equal(page.labelOf(segments[5]), "of a later version: 1 token");
});

test("what the two times say", () => {
  assert.match(page.verdict(300, 100, { blended: true }), /3\.0 times sooner/);
  assert.match(page.verdict(100, 200, { blended: true }), /2\.0 times later/);
  assert.match(page.verdict(100, 200, { blended: false, detail: "why" }), /Nothing.*why/);
  assert.equal(page.modelName("/models/of/mine/small"), "small");
  assert.equal(page.modelName("some/model"), "some/model");
  assert.equal(page.seconds(12.3), "12 ms");
  assert.equal(page.seconds(2345), "2.35 s");
});
