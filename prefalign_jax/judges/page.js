// Text from data enters the page through textContent alone, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const count = number => number.toLocaleString("en");
const store = "verdicts " + data.digest;
const LISTED = 500;  // rows of the list; a filter makes it shorter
let rows = data.rows.map((_, index) => index), at = 0, names = false, judged = false, listed = false, verdicts = {};
try { verdicts = JSON.parse(localStorage.getItem(store)) || {}; } catch (error) { /* storage is off: kept in memory */ }

function side(share) { return share > 0.5 ? "first" : share < 0.5 ? "second" : "tie"; }
const kept = {  // by what the filter says
  all: () => true,
  open: index => !(index in verdicts),
  yours: index => index in verdicts,
  differ: index => index in verdicts && data.rows[index].preference !== null && side(verdicts[index]) !== side(data.rows[index].preference),
  none: index => data.rows[index].preference === null,
};
for (const name of ["first", "tie", "second"]) {
  kept[name] = index => data.rows[index].preference !== null && side(data.rows[index].preference) === name;
}
function choose() {  // what the filter keeps; stays at the comparison that is shown, if it is kept
  const current = rows[at], text = get("search").value.toLowerCase();
  rows = data.rows.map((_, index) => index).filter(index => {
    const row = data.rows[index];
    const texts = () => [row.prompt_text, row.texts.first, row.texts.second, String(row.id)];
    return kept[get("filter").value](index) && (!text || texts().some(one => one.toLowerCase().includes(text)));
  });
  const next = rows.findIndex(index => index >= current);
  at = next < 0 ? Math.max(rows.length - 1, 0) : next;
  show();
}
function place(share, row) {  // which response it is on the page
  return share === 0.5 ? "tie" : (share > 0.5) !== row.swapped ? "1" : "2";
}
function list() {
  get("list").hidden = !listed;
  get("listed").setAttribute("aria-expanded", listed);
  if (!listed) return;
  get("list").replaceChildren(...rows.slice(0, LISTED).map((index, position) => {
    const row = data.rows[index], item = document.createElement("li"), button = document.createElement("button");
    const yours = index in verdicts ? ` · you: ${place(verdicts[index], row)}` : "";
    const theirs = judged ? ` · judge: ${row.preference === null ? "none" : place(row.preference, row)}` : "";
    button.textContent = `${count(index + 1)}. ${row.prompt_text.trim().split("\n")[0].slice(0, 100)}${yours}${theirs}`;
    button.setAttribute("aria-current", position === at);
    button.addEventListener("click", () => { at = position; show(); });
    item.append(button);
    return item;
  }));
  const current = get("list").querySelector("[aria-current=true]");
  if (current) get("list").scrollTop = current.offsetTop - get("list").offsetTop - 60;
}
function yours() {
  const own = Object.keys(verdicts), total = own.reduce((sum, index) => sum + verdicts[index], 0);
  const both = own.filter(index => data.rows[index].preference !== null);
  const same = both.filter(index => side(verdicts[index]) === side(data.rows[index].preference)).length;
  get("yours").textContent = own.length ? `${(100 * total / own.length).toFixed(1)}% of ${count(own.length)} for ${data.names[0]}`
    + (both.length ? `, the judge's verdict in ${count(same)} of ${count(both.length)}` : "") : "no verdicts yet";
}
function show() {
  yours();
  list();
  get("matches").textContent = rows.length === data.rows.length ? ""
    : `${count(rows.length)} of ${count(data.rows.length)}` + (listed && rows.length > LISTED ? `, the first ${LISTED} listed` : "");
  get("shown").hidden = !rows.length;
  get("where").textContent = rows.length ? "" : "nothing is like that";
  if (!rows.length) return;
  const index = rows[at], row = data.rows[index], order = row.swapped ? ["second", "first"] : ["first", "second"];
  get("where").textContent = `${count(index + 1)} of ${count(data.rows.length)}, ${count(Object.keys(verdicts).length)} judged by you; ${row.id}`;
  get("prompt").textContent = row.prompt_text;
  const own = verdicts[index];
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
function go(step) { at = Math.min(Math.max(at + step, 0), Math.max(rows.length - 1, 0)); show(); get("shown").scrollIntoView({block: "nearest"}); }
function record(position) {  // 0 or 1: that response is better; null: a tie
  if (!rows.length) return;
  const index = rows[at];
  verdicts[index] = position === null ? 0.5 : Number((position === 0) !== data.rows[index].swapped);
  try { localStorage.setItem(store, JSON.stringify(verdicts)); } catch (error) { /* kept in memory */ }
  if (get("filter").value === "open") choose(); else if (at + 1 < rows.length) go(1); else show();
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
  listed: () => { listed = !listed; show(); },
};
const keys = {ArrowLeft: "previous", k: "previous", ArrowRight: "next", j: "next", 1: "pick0", 2: "pick1", 0: "tie",
  n: "names", v: "judged", d: "download", l: "listed"};
for (const name of Object.keys(actions)) get(name).addEventListener("click", actions[name]);
get("filter").addEventListener("change", choose);
get("search").addEventListener("input", choose);
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "/") { event.preventDefault(); get("search").focus(); }
  if (!(event.key in keys)) return;
  event.preventDefault();
  actions[keys[event.key]]();
});
show();
