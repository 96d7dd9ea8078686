// The DIMM microscope in the browser: its fields, and the tables and pictures that Python sends.

function render({ model, el }) {
  const own = `snpbook-scope-${Math.random().toString(36).slice(2)}`, alertId = `${own}-alert`;
  const fields = {
    machine: make("select", {}, ...Object.entries(model.get("_machines")).map(([value, title]) =>
      make("option", { value }, title))),
    plain: make("input", { size: 34 }), hex: make("input", { type: "checkbox" }),
    spa: make("input", { size: 10 }), asid: make("input", { size: 5 }), c_bit: make("input", { type: "checkbox" }),
    copies: make("input", { size: 4 }), to: make("input", { size: 10 }), corrected: make("input", { type: "checkbox" }),
    replay: make("button", { type: "button" }, "Replay older ciphertext"),
  };
  for (const [name, field] of Object.entries(fields)) {
    field.id = `${own}-${name}`;
    if (field.type === "text") Object.assign(field, { spellcheck: false, autocomplete: "off" });
  }
  function label(words, field) {
    const name = make("label", { for: field.id }, words);
    return make("span", { class: "field" }, ...(field.type === "checkbox" ? [field, name] : [name, field]));
  }
  const submit = (words) => make("button", { type: "submit" }, words);
  const write = make("form", { "aria-label": "Write" }, label("Machine", fields.machine),
    label("Plaintext", fields.plain), label("as hex", fields.hex), label("Address", fields.spa),
    label("ASID", fields.asid), label("C-bit", fields.c_bit), label("Copies", fields.copies), submit("Write"));
  const move = make("form", { "aria-label": "As the host" }, make("span", { class: "quiet" }, "As the host, without the key:"),
    label("Move to", fields.to), label("add T(p) \u2295 T(q)", fields.corrected), submit("Move"), fields.replay);
  const refusal = make("p", { id: alertId, class: "refusal", role: "alert" }), status = make("p", { role: "status" });
  const way = make("div", { class: "scroll" }), readers = make("div", { class: "scroll" });
  const diary = make("div", { class: "scroll" }), heat = make("div", { class: "heat" });
  el.append(make("figure", {
    class: "snpbook-scope", style: `--alert: ${model.get("_alert")}`, "data-lm-suppress-shortcuts": "true",
  }, make("figcaption", {}, "DIMM microscope"), write, move, refusal, status, way, readers, diary, heat));

  const value = (field) => (field.type === "checkbox" ? field.checked : field.value);
  const send = (act) => model.send({
    do: act, ...Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, value(field)])),
  });
  const ask = (act) => (event) => {
    event.preventDefault();
    send(act);
  };
  on(enters(write), { submit: ask("write") });
  on(enters(move), { submit: ask("move") });
  on(fields.replay, { click: ask("replay") });

  function tellForm() {
    for (const [name, content] of Object.entries(model.get("_form"))) {
      if (typeof content === "boolean") fields[name].checked = content;
      else fields[name].value = content;
    }
  }
  function tellRefusal() {
    const { field, text = "" } = model.get("_refusal");
    for (const [name, node] of Object.entries(fields)) {
      const wrong = name === field;
      node.setAttribute("aria-invalid", String(wrong));
      if (wrong) node.setAttribute("aria-describedby", alertId);
      else node.removeAttribute("aria-describedby");
    }
    refusal.textContent = text;
    if (text) fields[field].focus();
  }
  function tellTables() {
    const tables = model.get("_tables");
    way.innerHTML = tables.way;
    readers.innerHTML = tables.readers;
    diary.innerHTML = tables.diary;
  }
  const tellLinear = () => (fields.corrected.disabled = !model.get("_linear")); // else it takes the key
  const tellStatus = () => (status.textContent = model.get("_status"));
  const tellHeat = () => (heat.innerHTML = model.get("_heat")[isDark(el) ? "dark" : "light"]);

  const listeners = {
    "change:_form": tellForm, "change:_refusal": tellRefusal, "change:_tables": tellTables,
    "change:_status": tellStatus, "change:_heat": tellHeat, "change:_linear": tellLinear,
  };
  const watch = new MutationObserver(tellHeat), scheme = matchMedia("(prefers-color-scheme: dark)");
  for (const name in listeners) model.on(name, listeners[name]);
  watch.observe(document.body, { attributes: true });
  scheme.addEventListener("change", tellHeat);
  tellForm(); tellTables(); tellStatus(); tellLinear(); tellHeat();
  requestAnimationFrame(tellHeat); // once it lies on its paper

  return () => {
    for (const name in listeners) model.off(name, listeners[name]);
    watch.disconnect();
    scheme.removeEventListener("change", tellHeat);
  };
}

export default { render };
