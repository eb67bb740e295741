"use strict";
// The choices at a token fill a panel: on hover, on touch, and with the arrow keys. Text goes in as text only.
function shown(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/^ | $/g, "␣");
}
function made(name, text, ...names) {
  const element = document.createElement(name);
  element.textContent = text;
  element.className = names.join(" ");
  return element;
}
function choices(title, list, actual) {
  const box = document.createElement("div"), ol = document.createElement("ol");
  box.append(made("h4", title));
  for (const [id, text, share] of list) {
    const li = made("li", "", id === actual ? "hit" : "");
    li.style.setProperty("--p", (100 * share).toFixed(1) + "%");
    li.append(made("span", shown(text)), made("span", (100 * share).toFixed(1) + " %"));
    ol.append(li);
  }
  box.append(ol);
  return box;
}
for (const reader of document.querySelectorAll(".reader")) {
  const tokens = JSON.parse(reader.querySelector("script").textContent);
  const panel = reader.querySelector(".panel"), spans = [...reader.querySelectorAll(".t")];
  let current = spans[0];
  const show = (span) => {
    const t = tokens[span.dataset.i], two = made("div", "", "two"), head = made("p", "next came ");
    current.classList.remove("on");
    current.tabIndex = -1;
    current = span;
    span.classList.add("on");
    span.tabIndex = 0;
    head.append(made("span", shown(t.text), "tok"), ` · KL ${t.kl.toFixed(3)} nats`);
    two.append(
      choices(`teacher · CE ${t.teacher_ce.toFixed(2)} · entropy ${t.teacher_entropy.toFixed(2)}`, t.teacher, t.id),
      choices(`student · CE ${t.ce.toFixed(2)} · entropy ${t.entropy.toFixed(2)}`, t.student, t.id));
    panel.replaceChildren(head, two);
  };
  const of = (event) => event.target.closest(".t");
  for (const kind of ["pointerover", "focusin", "click"]) {
    reader.addEventListener(kind, (event) => { if (of(event)) show(of(event)); });
  }
  reader.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!by || !of(event)) return;
    event.preventDefault();
    const at = spans.indexOf(of(event)) + by;
    spans[Math.min(Math.max(at, 0), spans.length - 1)].focus();
  });
  const first = spans.reduce((a, b) => (tokens[b.dataset.i].kl > tokens[a.dataset.i].kl ? b : a), spans[0]);
  if (first) show(first);
}
for (const filter of document.querySelectorAll(".filter")) {
  const word = filter.querySelector("input"), verdict = filter.querySelector("select"), count = filter.querySelector("output");
  const list = [...filter.parentElement.querySelectorAll("details[data-verdict]")];
  const apply = () => {
    const wanted = word.value.toLowerCase();
    for (const one of list) {
      one.hidden = (verdict.value && one.dataset.verdict !== verdict.value) || !one.textContent.toLowerCase().includes(wanted);
    }
    count.textContent = `${list.filter((one) => !one.hidden).length} of ${list.length}`;
  };
  word.addEventListener("input", apply);
  verdict.addEventListener("change", apply);
  apply();
}
addEventListener("hashchange", () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") { target.hidden = false; target.open = true; target.scrollIntoView(); }
});
