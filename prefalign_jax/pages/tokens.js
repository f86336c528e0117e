// The numbers of a token that is tapped, or reached by arrow keys: what pointing at it shows as its title.
"use strict";
const card = document.getElementById("token");
let current = null;
function pick(token) {
  if (current) current.classList.remove("picked");
  current = token;
  card.hidden = !token;
  if (!token) return;
  token.classList.add("picked");
  card.textContent = token.title;
  const place = token.getClientRects()[0] || token.getBoundingClientRect(), width = document.documentElement.clientWidth;
  card.style.left = `${Math.max(8, Math.min(place.left, width - card.offsetWidth - 8))}px`;
  card.style.top = `${place.bottom + scrollY + 4}px`;
}
addEventListener("click", event => {
  const token = event.target.closest(".text i[title]");
  pick(token === current ? null : token);
});
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const text = document.activeElement.closest(".text") || (current && current.closest(".text"));
  if (event.key === "Escape") { pick(null); return; }
  if (!text || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
  const tokens = [...text.querySelectorAll("i[title]")], at = tokens.indexOf(current);
  const to = {ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, tokens.length - 1), Home: 0, End: tokens.length - 1}[event.key];
  if (!tokens.length) return;
  event.preventDefault();
  tokens[to].scrollIntoView({block: "nearest"});
  pick(tokens[to]);
});
