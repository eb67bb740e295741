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
function nats(value, digits) {
  return value === null ? "∞" : value.toFixed(digits);
}
function choices(title, list, actual) {
  const box = document.createElement("div"), ol = document.createElement("ol");
  box.append(made("h3", title));
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
    head.append(made("span", shown(t.text), "tok"), ` · KL ${nats(t.kl, 3)} nats`);
    two.append(
      choices(`teacher · CE ${nats(t.teacher_ce, 2)} · entropy ${nats(t.teacher_entropy, 2)}`, t.teacher, t.id),
      choices(`student · CE ${nats(t.ce, 2)} · entropy ${nats(t.entropy, 2)}`, t.student, t.id));
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
  const first = spans.reduce((a, b) => ((tokens[b.dataset.i].kl ?? Infinity) > (tokens[a.dataset.i].kl ?? Infinity) ? b : a), spans[0]);
  if (first) show(first);
}
// A chart tells its values at the nearest logged step: under the pointer, or by the arrow keys.
for (const svg of document.querySelectorAll(".chart svg")) {
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name,
    color: line.classList[1],
    xs: line.getAttribute("points").split(" ").map((point) => parseFloat(point)),
    at: line.dataset.at.split(" ").map((pair) => pair.split(":")),
  }));
  if (!lines.length) continue; // bars have titles of their own
  const stops = [...new Set(lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const cursor = svg.querySelector(".axis").cloneNode(), tip = made("div", "", "tip");
  const nearest = (xs, x) => xs.reduce((best, other, i) => (Math.abs(other - x) < Math.abs(xs[best] - x) ? i : best), 0);
  const width = svg.viewBox.baseVal.width;
  let stop = -1;
  const show = (number) => {
    stop = Math.min(Math.max(number, 0), stops.length - 1);
    const x = stops[stop], here = lines.map((line) => [line, nearest(line.xs, x)]).filter(([line, i]) => line.xs[i] === x);
    cursor.setAttribute("class", "cursor");
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", 10]]) cursor.setAttribute(name, value);
    tip.replaceChildren(made("p", `step ${here[0][0].at[here[0][1]][0]}`));
    for (const [line, i] of here) {
      const p = made("p", ""), value = line.at[i][1];
      p.append(made("i", "", "swatch", line.color), `${line.name} ${value}`);
      tip.append(p);
    }
    tip.style.setProperty("--x", (100 * x) / width + "%");
    tip.classList.toggle("left", x > width / 2);
    svg.append(cursor);
    svg.parentElement.append(tip);
  };
  const hide = () => { cursor.remove(); tip.remove(); };
  const under = (event) => {
    const box = svg.getBoundingClientRect();
    show(nearest(stops, ((event.clientX - box.left) / box.width) * width));
  };
  svg.addEventListener("pointermove", under);
  svg.addEventListener("pointerdown", under);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) { event.preventDefault(); show(stop + by); }
  });
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
