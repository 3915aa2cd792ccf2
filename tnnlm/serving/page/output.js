// The output box: prompts, samples side by side, and the turns of a conversation. Texts are added as text
// nodes only, never as HTML.

const BLOCK = 4000; // characters per element: long text is split into several, so that layout stays fast

export function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// One completion of a prompt, or one answer of a conversation.
export class Sample {
  constructor(prompt = "") {
    this.blocks = element("div", "blocks");
    this.box = element("div", "sample", this.blocks);
    this.text = "";
    this.ids = []; // of the prompt and the completion
    this.known = false; // whether the server sends token ids
    this.finish = null;
    this.waiting = "";
    this.addBlock(prompt);
  }

  addBlock(prompt) {
    const part = (name, text) => element("span", name, document.createTextNode(text));
    this.blocks.append(element("div", "", part("prompt", prompt), part("completion", "")));
  }

  begin(stops) {
    this.finish = null;
    this.stops = stops;
    this.box.classList.add("running");
  }

  // Adds a choice of a streamed chunk.
  take(choice) {
    const text = choice.delta ? choice.delta.content || "" : choice.text;
    this.text += text;
    this.waiting += text;
    if (choice.prompt_token_ids) [this.ids, this.known] = [choice.prompt_token_ids, true];
    for (const id of choice.token_ids || []) this.ids.push(id);
    if (choice.finish_reason) this.end(choice.finish_reason);
  }

  end(reason) {
    this.finish = reason;
    this.box.classList.remove("running");
  }

  // Whether a stop string may have cut the text, which then has fewer characters than its tokens.
  get cut() {
    return this.stops && this.finish === "stop";
  }

  // Shows the text received since the last frame.
  flush() {
    while (this.waiting) {
      const node = this.blocks.lastElementChild.lastElementChild.firstChild;
      const border = this.waiting.indexOf("\n", Math.max(0, BLOCK - node.length));
      if (border < 0) {
        node.appendData(this.waiting);
        break;
      }
      node.appendData(this.waiting.slice(0, border));
      this.waiting = this.waiting.slice(border + 1); // a new block starts a new line
      this.addBlock("");
    }
    this.waiting = "";
  }
}

// Samples in columns, with a title each if there are several; `select` makes one of them selectable.
export function columns(samples, select) {
  const row = element("div", "samples", ...samples.map((sample) => sample.box));
  if (samples.length === 1) return row;
  samples.forEach((sample, i) => {
    const title = element("label", "title");
    if (select) {
      const radio = Object.assign(element("input"), { type: "radio", name: "answer", checked: !i });
      radio.addEventListener("change", () => select(sample));
      title.append(radio);
    }
    title.append(`Sample ${i + 1}`);
    sample.box.prepend(select ? title : element("h3", "title", ...title.childNodes));
  });
  return row;
}

export function turn(role, name, ...content) {
  return element("div", `turn ${role}`, element("h3", "", name), ...content);
}
