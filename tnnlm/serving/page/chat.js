// A conversation: its messages, and the answers to the last of them, one of which is given to the model.

import { Sample, columns, element, turn } from "./output.js";

export class Conversation {
  constructor() {
    this.clear();
  }

  clear() {
    this.asked = []; // messages up to the last one of the user
    this.samples = []; // answers to it
    this.kept = null; // the answer that the conversation continues with
    this.turns = []; // elements of the last message and its answers
  }

  // Messages as the server gets them.
  get messages() {
    const answer = this.kept?.text ? [{ role: "assistant", content: this.kept.text }] : [];
    return [...this.asked, ...answer];
  }

  get empty() {
    return !this.asked.length;
  }

  // Adds a message of the user to the conversation and its box; returns the samples that answer it.
  ask(message, n, box, name) {
    this.asked = [...this.messages, { role: "user", content: message }];
    this.#removeOthers();
    this.samples = Array.from({ length: n }, () => new Sample());
    this.kept = this.samples[0];
    const answers = columns(this.samples, (sample) => (this.kept = sample));
    this.turns = [
      turn("user", "You", element("div", "blocks", message)),
      turn("assistant", name, answers, element("p", "hint")),
    ];
    box.append(...this.turns);
    return this.samples;
  }

  // Ends the last turn with a line about it; without an answer, removes it and returns false.
  answered(line) {
    const texts = this.samples.filter((sample) => sample.text);
    if (texts.length) {
      this.turns[1].lastElementChild.textContent = line;
      return true;
    }
    for (const part of this.turns) part.remove();
    this.asked = this.asked.slice(0, -1);
    [this.samples, this.kept] = [[], null];
    return false;
  }

  transcript() {
    return this.messages.map(({ role, content }) => `${role}: ${content}`).join("\n\n");
  }

  // Shows only the answer that the model is given.
  #removeOthers() {
    for (const sample of this.samples) if (sample !== this.kept) sample.box.remove();
    this.kept?.box.querySelector(".title")?.remove();
  }
}
