// Text from data enters the page through textContent alone, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const count = number => number.toLocaleString("en");
const store = "verdicts " + data.digest;
let at = 0, names = false, judged = false, verdicts = {};
try { verdicts = JSON.parse(localStorage.getItem(store)) || {}; } catch (error) { /* storage is off: kept in memory */ }

function show() {
  const row = data.rows[at], order = row.swapped ? ["second", "first"] : ["first", "second"];
  get("where").textContent = `${count(at + 1)} of ${count(data.rows.length)}, ${count(Object.keys(verdicts).length)} judged by you; ${row.id}`;
  get("prompt").textContent = row.prompt_text;
  const own = verdicts[at];
  order.forEach((side, i) => {
    const name = names ? data.names[side === "first" ? 0 : 1] : "";
    get("name" + i).textContent = "Response " + (i + 1) + (name && ": " + name);
    get("text" + i).textContent = row.texts[side];
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
  verdicts[at] = position === null ? 0.5 : Number((position === 0) !== swapped);
  try { localStorage.setItem(store, JSON.stringify(verdicts)); } catch (error) { /* kept in memory */ }
  if (at + 1 < data.rows.length) go(1); else show();
}
function lines() {
  return Object.keys(verdicts).map(Number).sort((a, b) => a - b).map(i => {
    const row = data.rows[i];
    const out = {prompt: row.prompt, first: row.first, second: row.second, id: row.id, preference: verdicts[i]};
    return JSON.stringify(out) + "\n";
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
