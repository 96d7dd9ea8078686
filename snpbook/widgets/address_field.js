// A field for an address in the browser, and the complaint beside it.

function render({ model, el }) {
  const own = `snpbook-address-${Math.random().toString(36).slice(2)}`, alertId = `${own}-alert`;
  const field = make("input", { id: own, type: "text", size: 19, spellcheck: "false", autocomplete: "off" });
  const complaint = make("span", { id: alertId, class: "refusal", role: "alert" });
  el.append(make("div", {
    class: "snpbook-address", style: `--alert: ${model.get("_alert")}`, "data-lm-suppress-shortcuts": "true",
  }, make("label", { for: own }, model.get("description")), field, complaint));

  function send() {
    model.set("value", field.value);
    model.save_changes();
    model.send(field.value); // a state may wait for a busy kernel, and the button pressed next does not
  }
  on(field, {
    change: send,
    keydown: (event) => event.key === "Enter" && send(),
  });

  function tellValue() {
    if (document.activeElement !== field) field.value = model.get("value"); // what is being typed is the reader's
  }
  function tellComplaint() {
    const text = model.get("complaint");
    field.setAttribute("aria-invalid", String(text !== ""));
    if (text) field.setAttribute("aria-describedby", alertId);
    else field.removeAttribute("aria-describedby");
    complaint.textContent = text;
  }
  const listeners = { "change:value": tellValue, "change:complaint": tellComplaint };
  for (const name in listeners) model.on(name, listeners[name]);
  tellValue(); tellComplaint();

  return () => {
    for (const name in listeners) model.off(name, listeners[name]);
  };
}

export default { render };
