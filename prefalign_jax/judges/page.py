"""Comparisons side by side in one self-contained HTML page, read blind, with a person's own verdicts to download."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.files import whole
from prefalign_jax.generation.sample_files import as_text
from prefalign_jax.judges.judge import Verdict

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --mark: #2c6fbb; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 0 1rem 6rem; }
h1 { font-size: 1.2rem; margin: 1rem 0 .3rem; }
#keys, #where { color: #777; font-size: .85rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
#prompt { border-left: 4px solid var(--line); padding: .3rem .8rem; margin: 1rem 0; max-height: 30vh; overflow: auto; }
#sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 700px) { #sides { grid-template-columns: 1fr; } }
section { border: 2px solid var(--line); border-radius: 6px; padding: .5rem .8rem; }
section.won { border-color: var(--mark); }
h2 { font-size: .9rem; margin: 0 0 .5rem; color: #777; font-weight: 600; }
nav { position: fixed; bottom: 0; left: 0; right: 0; background: Canvas; border-top: 1px solid var(--line);
  padding: .5rem 1rem; display: flex; flex-wrap: wrap; gap: .4rem; justify-content: center; }
button { font: inherit; padding: .2rem .7rem; }
button[aria-pressed=true] { background: var(--mark); color: #fff; }
#verdict { min-height: 1.5em; margin: .6rem 0; }
"""

# Text from data enters the page through textContent alone, never as markup.
_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const store = "verdicts " + data.digest;
let at = 0, names = false, judged = false, mine = {};
try { mine = JSON.parse(localStorage.getItem(store)) || {}; } catch (error) { /* storage is off: kept in memory */ }

function show() {
  const row = data.rows[at], order = row.swapped ? ["second", "first"] : ["first", "second"];
  get("where").textContent = `${at + 1} of ${data.rows.length}, ${Object.keys(mine).length} judged by you; ${row.id}`;
  get("prompt").textContent = row.prompt_text;
  const own = mine[at];
  order.forEach((side, i) => {
    const name = names ? data.names[side === "first" ? 0 : 1] : "";
    get("name" + i).textContent = "Response " + (i + 1) + (name && ": " + name);
    get("text" + i).textContent = row[side];
    const share = side === "first" ? own : 1 - own;
    get("side" + i).className = own !== undefined && share > 0.5 ? "won" : "";
    get("pick" + i).setAttribute("aria-pressed", own !== undefined && share > 0.5);
  });
  get("tie").setAttribute("aria-pressed", own === 0.5);
  get("names").setAttribute("aria-pressed", names);
  get("judged").setAttribute("aria-pressed", judged);
  let text = "";
  if (judged) {
    const share = row.swapped ? 1 - row.preference : row.preference;
    text = row.preference === null ? data.judge + ": no verdict (" + row.reason + ")"
      : data.judge + ": " + (share === 0.5 ? "tie" : "response " + (share > 0.5 ? 1 : 2) + " is better");
    if (row.scores) {
      const scores = row.swapped ? [row.scores[1], row.scores[0]] : row.scores;
      text += "; scores " + scores.map(x => Number(x.toPrecision(4))).join(" and ");
    }
  }
  get("verdict").textContent = text;
}
function go(step) { at = Math.min(Math.max(at + step, 0), data.rows.length - 1); show(); scrollTo(0, 0); }
function record(position) {  // 0 or 1: that response is better; null: a tie
  const swapped = data.rows[at].swapped;
  mine[at] = position === null ? 0.5 : Number((position === 0) !== swapped);
  try { localStorage.setItem(store, JSON.stringify(mine)); } catch (error) { /* kept in memory */ }
  if (at + 1 < data.rows.length) go(1); else show();
}
function lines() {
  return Object.keys(mine).map(Number).sort((a, b) => a - b).map(i => {
    const row = data.rows[i];
    const out = {prompt: row.prompt, first: row.first, second: row.second, id: row.id, preference: mine[i]};
    return JSON.stringify(out) + "\\n";
  }).join("");
}
function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], {type: "application/x-ndjson"}));
  link.download = "human_verdicts.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}
const actions = {
  previous: () => go(-1), next: () => go(1), pick0: () => record(0), pick1: () => record(1), tie: () => record(null),
  names: () => { names = !names; show(); }, judged: () => { judged = !judged; show(); }, download,
};
const keys = {ArrowLeft: "previous", k: "previous", ArrowRight: "next", j: "next", 1: "pick0", 2: "pick1", 0: "tie",
  n: "names", v: "judged", d: "download"};
for (const name of Object.keys(actions)) get(name).addEventListener("click", actions[name]);
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  actions[keys[event.key]]();
});
show();
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>TITLE</title>
<style>STYLE</style>
</head>
<body>
<h1>TITLE</h1>
<div id="keys">← → move, 1 or 2 the better response, 0 tie, n names, v the judge's verdict, d download yours</div>
<div id="where"></div>
<div id="prompt" class="text"></div>
<div id="sides">
<section id="side0"><h2 id="name0"></h2><div id="text0" class="text"></div></section>
<section id="side1"><h2 id="name1"></h2><div id="text1" class="text"></div></section>
</div>
<div id="verdict"></div>
<nav>
<button id="previous">← previous</button>
<button id="pick0">1 is better</button>
<button id="tie">tie</button>
<button id="pick1">2 is better</button>
<button id="next">next →</button>
<button id="names">names</button>
<button id="judged">the judge's verdict</button>
<button id="download">download your verdicts</button>
</nav>
<noscript>This page needs JavaScript; it loads nothing from elsewhere.</noscript>
<script type="application/json" id="data">DATA</script>
<script>SCRIPT</script>
</body>
</html>
"""


def page(verdicts: Sequence[Verdict], names: tuple[str, str], judge: str = "judge") -> str:
    """HTML that shows a comparison at a time, the models' names hidden and on sides that a digest of the texts chooses.

    A person's own verdicts stay in the browser and can be downloaded as JSONL that `judge.read_verdicts` reads.

    Args:
      verdicts: at least one; those without preference are shown too.
      names: of (first, second).
      judge: what gave the verdicts.

    Returns:
      The page, without anything to load from elsewhere.
    """
    rows = []
    for verdict in verdicts:
        comparison = verdict.comparison
        texts = json.dumps([comparison.prompt, sorted([comparison.first, comparison.second])])
        odd = hashlib.sha256(texts.encode()).digest()[0] % 2 == 1
        rows.append(
            {
                **comparison._asdict(),
                "prompt_text": as_text(comparison.prompt),
                "preference": verdict.preference,
                "reason": verdict.reason,
                "scores": verdict.scores,
                # Of the two texts, not of the models: which model a digest puts first is as good as a coin.
                "swapped": odd != (comparison.first > comparison.second),
            }
        )
    digest = hashlib.sha256(json.dumps([names, rows]).encode()).hexdigest()
    data = json.dumps({"names": names, "judge": judge, "digest": digest, "rows": rows})
    for mark in "<>&":  # no text can end the script element or begin a comment in it
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    title = html.escape(f"{len(rows)} comparisons, {judge}")
    parts = {"TITLE": title, "STYLE": _STYLE, "SCRIPT": _SCRIPT, "DATA": data}
    pieces, rest = [], _PAGE
    for name in ("TITLE", "STYLE", "TITLE", "DATA", "SCRIPT"):  # in their order: what was put in is not searched again
        before, rest = rest.split(name, 1)
        pieces += [before, parts[name]]
    return "".join([*pieces, rest])


def write_page(path: str | Path, verdicts: Sequence[Verdict], names: tuple[str, str], judge: str = "judge") -> None:
    """Writes `page` to a file, which appears whole or not at all."""
    with whole(Path(path)) as part:
        part.write_text(page(verdicts, names, judge), encoding="utf-8")
