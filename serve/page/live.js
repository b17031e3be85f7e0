// The page: one or two panes, each a live session, and the controls of the active one.
import { Player } from "/player.js";

const $ = (id) => document.getElementById(id);
const KEYS = {
  up: ["ArrowUp", "KeyW"], down: ["ArrowDown", "KeyS"], left: ["ArrowLeft", "KeyA"], right: ["ArrowRight", "KeyD"],
};
const MOVES = {
  KeyW: ["forward", 1], KeyS: ["forward", -1], KeyD: ["right", 1], KeyA: ["right", -1],
  ArrowRight: ["yaw", 1], ArrowLeft: ["yaw", -1], ArrowUp: ["pitch", 1], ArrowDown: ["pitch", -1],
};
const MOVED = { up: "Move forward", down: "Move back", left: "Move left", right: "Move right" };
const DEGREES = 0.2; // that a camera turns for a pixel of the mouse
const TURNS = 100; // milliseconds between two turns of the mouse
const ARROWS = { up: "M12 19V5M6 11l6-6 6 6", down: "M12 5v14M6 13l6 6 6-6", left: "M19 12H5M11 6l-6 6 6 6", right: "M5 12h14M13 6l6 6-6 6" };
const RECONNECT = [300, 700, 1500, 3000, 5000]; // milliseconds before each try
const POINTS = 60; // of a graph

let token = sessionStorage.getItem("inferix.token") || "";
let model = null;
let panes = [];
let active = null;
const held = new Set();

// HTTP and access

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askToken();
    return call(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error ? body.error.message : `${response.status} ${response.statusText}`);
  }
  return response;
}

function askToken() {
  return new Promise((done) => {
    const dialog = $("token-dialog");
    dialog.addEventListener("close", () => {
      token = $("token").value.trim();
      sessionStorage.setItem("inferix.token", token);
      done();
    }, { once: true });
    dialog.showModal();
  });
}

const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text))).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");

// A session: the WebSocket, its receipts, and coming back after a disconnection

class World {
  constructor(pane) {
    this.pane = pane;
    this.sent = new Map(); // by id: {type, at, done, failed}
    this.last = 0;
    this.tries = 0;
    this.over = false;
  }

  // begin: the first message, `open` or `attach`.
  connect(begin) {
    const protocols = ["inferix.json", ...(token ? [`inferix.token.${base64(token)}`] : [])];
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/live`, protocols);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => this.send(begin.type, begin);
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.event(JSON.parse(data));
      else this.pane.player.take(data);
    };
    socket.onclose = ({ code }) => this.closed(code, begin);
  }

  send(type, fields = {}) {
    const id = ++this.last;
    if (this.socket.readyState !== WebSocket.OPEN) return Promise.reject(new Error("not connected"));
    this.socket.send(JSON.stringify({ ...fields, type, id }));
    return new Promise((done, failed) => this.sent.set(id, { type, at: performance.now(), done, failed }));
  }

  event(event) {
    const sent = this.sent.get(event.id);
    if (event.type === "opened") {
      this.tries = 0;
      this.facts = event;
      this.sent.delete(event.id);
      if (sent) sent.done(event); // none after a move to another server
      this.pane.opened(event);
    } else if (event.type === "applied") {
      this.sent.delete(event.id);
      if (sent) {
        sent.done(event);
        this.pane.applied(event, sent);
      }
    } else if (event.type === "refused") {
      this.sent.delete(event.id);
      if (sent) sent.failed(Object.assign(new Error(event.message), { refusal: event }));
      if (sent && ["open", "attach"].includes(sent.type)) this.refused = event;
    } else if (event.type === "state") {
      this.pane.state(event);
    } else if (event.type === "queued") {
      this.pane.wait(event.position ? `Waiting for a place: ${event.position} before you` : "Waiting for a place: you are next");
    } else if (event.type === "notice") {
      this.pane.notice(event);
    } else if (event.type === "ended") {
      this.over = true;
      this.pane.ended(event);
    }
  }

  closed(code) {
    for (const { failed } of this.sent.values()) failed(new Error("the connection was closed"));
    this.sent.clear();
    if (this.over || this.left) return;
    if (code === 4001) return this.pane.lost("This world is open in another tab.");
    if (this.refused && !this.facts) return this.pane.refused(this.refused);
    if (this.refused) return this.pane.lost("The session is over.");
    if (!this.facts || this.tries >= RECONNECT.length) return this.pane.lost("The server does not answer.");
    setStatus("warn", "Reconnecting");
    const { session, resume } = this.facts;
    setTimeout(() => this.connect({ type: "attach", session, resume, media: wantedMedia() }), RECONNECT[this.tries++]);
  }

  leave() {
    this.left = true;
    if (this.socket.readyState === WebSocket.OPEN) this.send("stop").catch(() => {});
    this.socket.close();
  }
}

// A pane: a picture, its recent blocks, and its measurements

class Pane {
  constructor() {
    this.element = document.createElement("div");
    this.element.className = "pane";
    this.element.innerHTML = `
      <canvas class="glow" width="16" height="16" aria-hidden="true"></canvas>
      <div class="screen"><canvas width="64" height="64" role="img" aria-label="Live picture of the world" tabindex="0"></canvas></div>
      <div class="hud"><span class="chip now" hidden></span><span class="chip rec" hidden>● REC</span></div>
      <button class="close" type="button" aria-label="Close this world" title="Close this world" hidden><svg viewBox="0 0 24 24" aria-hidden="true"><path d="M5 5l14 14M19 5 5 19"/></svg></button>
      <div class="wait"><div class="spinner"></div><span>Opening the world</span></div>`;
    this.canvas = this.element.querySelector(".screen canvas");
    this.glow = this.element.querySelector(".glow").getContext("2d");
    this.player = new Player(this.canvas, (entry) => this.drawn(entry));
    this.world = new World(this);
    this.blocks = []; // {block, seconds, thumbnail}
    this.keptFrom = 0;
    this.awaited = []; // acts and prompts that are applied and not yet on the screen
    this.latency = [];
    this.made = [];
    this.slack = [];
    this.paused = false;
    this.element.addEventListener("pointerdown", () => activate(this));
    this.canvas.addEventListener("focus", () => activate(this));
    this.canvas.addEventListener("pointerdown", (event) => hasCamera() && this.canvas.setPointerCapture(event.pointerId));
    this.canvas.addEventListener("pointermove", look);
    this.element.querySelector(".close").addEventListener("click", (event) => {
      event.stopPropagation();
      closePane(this);
    });
    $("panes").append(this.element);
    panes.push(this);
    layout();
  }

  wait(message, spin = true) {
    const cover = this.element.querySelector(".wait");
    cover.hidden = message === null;
    if (message === null) return;
    cover.querySelector("span").textContent = message;
    cover.querySelector(".spinner").hidden = !spin;
    cover.querySelector("button")?.remove();
  }

  opened(event) {
    this.player.start(event.media);
    this.paused = event.paused;
    this.element.classList.toggle("crisp", event.media.width < 256);
    $("strip").classList.toggle("crisp", event.media.width < 256);
    this.prompt = event.prompt;
    if (this === active) showPane();
    if (panes.length === 1) remember(event);
    if (!this.player.drawn) this.wait("Making the first picture");
  }

  // A control has its receipt: measure to the first picture that shows it.
  applied(event, sent) {
    if (["act", "camera", "prompt"].includes(sent.type)) this.awaited.push({ block: event.block, at: sent.at });
    if (["rewind", "restore", "seed"].includes(sent.type)) {
      this.player.flush();
      this.awaited = [];
      this.blocks = this.blocks.filter(({ block }) => sent.type === "rewind" && block < event.block);
      drawStrip();
    }
    if (sent.type === "pause" || sent.type === "resume") {
      this.paused = sent.type === "pause";
      if (this === active) showPane();
    }
  }

  drawn(entry) {
    if (!this.element.querySelector(".wait").hidden) this.wait(null);
    this.glow.drawImage(this.canvas, 0, 0, 16, 16);
    if (entry.first !== false && entry.first !== undefined) {
      const shown = this.awaited.filter(({ block }) => block <= entry.block);
      this.awaited = this.awaited.filter(({ block }) => block > entry.block);
      for (const { at } of shown) push(this.latency, (performance.now() - at) / 1000);
      if (shown.length && this === active) drawMeters();
      this.keep(entry.block);
    }
  }

  // Keep a thumbnail of a block's first picture.
  keep(block) {
    if (this.blocks.some((known) => known.block === block)) return;
    const thumbnail = document.createElement("canvas");
    thumbnail.height = 96;
    thumbnail.width = Math.round((96 * this.canvas.width) / this.canvas.height);
    const context = thumbnail.getContext("2d");
    context.imageSmoothingEnabled = this.canvas.width >= 512 && !this.element.classList.contains("crisp");
    context.drawImage(this.canvas, 0, 0, thumbnail.width, thumbnail.height);
    this.blocks.push({ block, thumbnail, seconds: this.startOf(block) });
    if (this.blocks.length > Math.max(8, this.world.facts.rewind_blocks) + 2) this.blocks.shift();
    if (this === active) drawStrip();
  }

  startOf(block) {
    const { frames_per_block: frames, media } = this.world.facts;
    return block === 0 ? 0 : ((block - 1) * frames + 1) / media.fps;
  }

  state(event) {
    const { seconds } = event;
    push(this.made, ["encode", "prepare", "denoise", "commit", "decode"].reduce((sum, stage) => sum + (seconds[stage] || 0), 0));
    if (event.slack !== undefined) push(this.slack, event.slack);
    this.keptFrom = event.kept_from;
    this.last = event;
    if (event.prompt !== undefined) this.prompt = event.prompt;
    const chip = this.element.querySelector(".now");
    chip.hidden = false;
    const action = event.action && event.action !== this.world.facts.rest ? ` · ${event.action}` : "";
    const behind = event.latency === undefined ? "" : ` · ${event.latency.toFixed(1)} s behind the camera`;
    chip.textContent = `${event.position.toFixed(1)} s${action}${behind}`;
    if (this === active) {
      drawMeters();
      drawDrift(event.drift);
      setStatus("live", `Live, ${event.rate.toFixed(1)} of ${this.world.facts.media.fps} FPS`);
      for (const item of $("strip").querySelectorAll("button")) item.disabled = Number(item.dataset.block) < this.keptFrom;
    }
  }

  notice(event) {
    if (event.kind === "skipped") toast(`This page was slow: ${event.blocks} blocks were left out.`);
    if (event.kind === "moved") toast(`Another server goes on with this world, after ${event.seconds.toFixed(1)} s.`);
    if (event.kind === "draining") toast(event.message);
  }

  ended(event) {
    if (panes.length > 1) return closePane(this);
    forget();
    this.lost(`The session has ended: ${event.message}.`);
  }

  refused(event) {
    forget();
    const busy = event.code === "at_capacity";
    if (event.code === "not_found" && this.begun === "attach") return this.restart();
    this.lost(busy ? "All places are taken. " + event.message : event.message);
  }

  lost(message) {
    setStatus("bad", "Disconnected");
    this.wait(message, false);
    const again = document.createElement("button");
    again.className = "primary";
    again.textContent = "Start a new world";
    again.addEventListener("click", () => this.restart());
    this.element.querySelector(".wait").append(again);
  }

  // Show another session. fields: of the message that it begins with.
  renew(fields) {
    this.world.left = true;
    this.world = new World(this);
    this.blocks = [];
    this.begin(fields);
  }

  restart() {
    if (camera) stopCamera();
    this.renew({ type: "open", prompt: $("prompt").value.trim() || model.examples[0] || "a quiet place", seed: seedValue() });
  }

  begin(fields) {
    this.begun = fields.type;
    this.wait("Opening the world");
    this.world.connect({ media: wantedMedia(), ...fields });
  }

  close() {
    this.world.leave();
    this.player.close();
    this.element.remove();
  }
}

// Which media the browser shows best: small pictures exactly, large ones as video.
function wantedMedia() {
  const chosen = new URLSearchParams(location.search).get("media");
  if (chosen) return [chosen];
  const small = model.size[0] * model.size[1] <= 128 * 128;
  const video = "VideoDecoder" in window ? ["h264", "vp9"] : [];
  return small ? ["raw"] : [...video, "jpeg"];
}

function layout() {
  $("panes").classList.toggle("two", panes.length > 1);
  for (const pane of panes) pane.element.querySelector(".close").hidden = panes.length < 2;
  $("fork").disabled = panes.length > 1;
}

function activate(pane) {
  if (active === pane) return;
  releaseAll();
  active = pane;
  for (const other of panes) other.element.classList.toggle("active", other === pane);
  showPane();
}

function closePane(pane) {
  pane.close();
  panes = panes.filter((other) => other !== pane);
  layout();
  active = null;
  activate(panes[0]);
  if (panes[0].world.facts) remember(panes[0].world.facts);
}

// Show the active pane's values in the controls.
function showPane() {
  if (!active) return;
  $("pause").setAttribute("aria-pressed", active.paused);
  $("pause").querySelector("span").textContent = active.paused ? "Resume" : "Pause";
  if (document.activeElement !== $("prompt") && active.prompt) $("prompt").value = active.prompt;
  drawStrip();
  drawMeters();
}

// What a reload of the page comes back to

function remember({ session, resume }) {
  sessionStorage.setItem("inferix.session", JSON.stringify({ session, resume }));
}

function forget() {
  sessionStorage.removeItem("inferix.session");
}

// Controls

function command(type, fields) {
  return active.world.send(type, fields).catch((error) => {
    toast(error.message, "bad");
    throw error;
  });
}

const quietly = (promise) => promise.catch(() => {});

function press(action) {
  if (held.has(action) || !active || !active.world.facts || !active.world.facts.actions.includes(action)) return;
  held.add(action);
  $("pad").querySelector(`[data-action="${action}"]`)?.classList.add("down");
  quietly(command("act", { action, pressed: true }));
}

function release(action) {
  if (!held.delete(action)) return;
  $("pad").querySelector(`[data-action="${action}"]`)?.classList.remove("down");
  quietly(command("act", { action, pressed: false }));
}

// A world with a camera: held keys move it, the mouse turns it.
const moves = new Set();
const hasCamera = () => active && active.world.facts && active.world.facts.camera;
let turn = [0, 0], turning = null;

function moveCamera(degrees) {
  const shares = {};
  for (const code of moves) shares[MOVES[code][0]] = (shares[MOVES[code][0]] || 0) + MOVES[code][1];
  quietly(command("camera", degrees ? { ...shares, turn: degrees } : shares));
}

function holdMove(code, down) {
  if (moves.has(code) === down || !hasCamera()) return;
  if (down) moves.add(code);
  else moves.delete(code);
  moveCamera();
}

// A button of the pad: it moves a camera, or is an action's key.
function steer(action, down) {
  if (!hasCamera()) return down ? press(action) : release(action);
  holdMove(KEYS[action].at(-1), down);
  $("pad").querySelector(`[data-action="${action}"]`).classList.toggle("down", down);
}

function look(event) {
  if (!hasCamera() || !event.buttons) return;
  const most = (value) => Math.max(-360, Math.min(360, value));
  turn = [most(turn[0] + event.movementX * DEGREES), most(turn[1] - event.movementY * DEGREES)];
  turning ||= setTimeout(() => {
    const degrees = turn;
    [turn, turning] = [[0, 0], null];
    if (hasCamera()) moveCamera(degrees);
  }, TURNS);
}

function releaseAll() {
  [...held].forEach(release);
  [...moves].forEach((code) => holdMove(code, false));
}
const actionOf = (code) => Object.keys(KEYS).find((action) => KEYS[action].includes(code));

const typing = (event) => event.target.closest("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey;

addEventListener("keydown", (event) => {
  if (typing(event)) return;
  const action = actionOf(event.code);
  const onButton = event.target.closest("button, a");
  if (hasCamera() && event.code in MOVES) {
    event.preventDefault();
    holdMove(event.code, true);
  } else if (action) {
    event.preventDefault();
    press(action);
  } else if (event.code === "Space" && !onButton) {
    event.preventDefault();
    $("pause").click();
  } else if (event.code === "KeyP") {
    event.preventDefault();
    $("prompt").focus();
    $("prompt").select();
  } else if (event.code === "KeyR" && !event.repeat) $("back").click();
  else if (event.code === "KeyF" && !event.repeat) $("fork").click();
});
addEventListener("keyup", (event) => {
  const action = actionOf(event.code);
  holdMove(event.code, false);
  if (action) release(action);
});
addEventListener("blur", releaseAll);

function makePad(actions) {
  const pad = $("pad"), arrows = actions.filter((action) => action in ARROWS);
  const shown = arrows.length ? arrows : actions;
  pad.hidden = shown.length < 2;
  pad.classList.toggle("plain", !arrows.length);
  pad.replaceChildren(...shown.map((action) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.action = action;
    button.setAttribute("aria-label", model.camera ? MOVED[action] : `Walk ${action}`);
    button.innerHTML = action in ARROWS ? `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${ARROWS[action]}"/></svg>` : "";
    if (!(action in ARROWS)) button.textContent = action;
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      button.setPointerCapture(event.pointerId);
      steer(action, true);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => steer(action, false));
    button.addEventListener("keydown", (event) => ["Enter", "Space"].includes(event.code) && (event.preventDefault(), steer(action, true)));
    button.addEventListener("keyup", (event) => ["Enter", "Space"].includes(event.code) && steer(action, false));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    return button;
  }));
}

const seedValue = () => Math.max(0, Math.floor(Number($("seed").value) || 0));

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text) return;
  quietly(command("prompt", { text }).then(() => note(text)));
  $("prompt").blur();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("prompt-form").requestSubmit();
  } else if (event.key === "Escape") $("prompt").blur();
});
$("history").addEventListener("change", () => {
  if (!$("history").value) return;
  $("prompt").value = $("history").value;
  $("history").value = "";
  $("prompt-form").requestSubmit();
});
$("restart").addEventListener("click", () => {
  const prompt = $("prompt").value.trim();
  if (!active.world.facts || active.world.over) return active.restart();
  const restarted = prompt && prompt !== active.prompt
    ? command("prompt", { text: prompt }).then(() => command("seed", { seed: seedValue() }))
    : command("seed", { seed: seedValue() });
  quietly(restarted);
});
$("pause").addEventListener("click", () => quietly(command(active.paused ? "resume" : "pause")));
$("back").addEventListener("click", () => {
  const block = Math.max(active.keptFrom, (active.last ? active.last.block : 0) - 1);
  quietly(command("rewind", { block }));
});
$("fork").addEventListener("click", async () => {
  if (panes.length > 1) return;
  const from = active;
  const { session, resume } = await command("fork").catch(() => ({}));
  if (!session) return;
  const twin = new Pane();
  twin.begin({ type: "attach", session, resume });
  from.element.classList.toggle("active", from === active);
  twin.element.scrollIntoView({ block: "nearest" }); // on a phone the button is below the pictures
  toast("Forked: choose a picture to steer it.");
});
$("save").addEventListener("click", async () => {
  const { world, bytes } = await command("save").catch(() => ({}));
  if (!world) return;
  const link = `${location.origin}/#world=${world}`;
  const download = button("Download", async () => {
    const blob = await (await call(`/v1/worlds/${world}`)).blob();
    offer(blob, `world-${world.slice(0, 8)}.safetensors`);
  });
  const share = button("Copy link", async () => {
    await navigator.clipboard.writeText(link);
    share.textContent = "Copied";
  });
  toast(`Saved, ${(bytes / 1e6).toFixed(1)} MB.`, "", 20000, download, share);
});
$("load").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const file = $("file").files[0];
  $("file").value = "";
  if (!file) return;
  try {
    const { id } = await (await call("/v1/worlds", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } })).json();
    await command("restore", { world: id });
    toast(`${file.name} goes on.`);
  } catch (error) {
    toast(error.message, "bad");
  }
});

// The camera's video goes to the server by WebRTC, and the active pane shows the world that is made from it.

let camera = null; // {stream, peer}
let starting = false; // while the browser asks for the camera, and the server answers

const gathered = (peer) => new Promise((done) => {
  const look = () => peer.iceGatheringState === "complete" && done();
  peer.addEventListener("icegatheringstatechange", look);
  look();
});

async function startCamera() {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { frameRate: { ideal: 30 } } });
  const peer = new RTCPeerConnection(), pane = active;
  camera = { stream, peer };
  $("camera").setAttribute("aria-pressed", "true");
  stream.getTracks().forEach((track) => peer.addTransceiver(track, { direction: "sendonly" }));
  await peer.setLocalDescription();
  await gathered(peer);
  pane.world.leave();
  pane.wait("Opening the world");
  const prompt = $("prompt").value.trim() || model.examples[0] || "a quiet place";
  const strength = new URLSearchParams(location.search).get("strength") || "0.6";
  const query = new URLSearchParams({ prompt, seed: seedValue(), strength });
  const options = { method: "POST", body: peer.localDescription.sdp, headers: { "Content-Type": "application/sdp" } };
  const answer = await call(`/v1/whip?${query}`, options);
  await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
  pane.renew({ type: "attach", session: answer.headers.get("Location").split("/").at(-1), resume: answer.headers.get("Inferix-Resume") });
}

function stopCamera() {
  camera.stream.getTracks().forEach((track) => track.stop());
  camera.peer.close();
  camera = null;
  $("camera").setAttribute("aria-pressed", "false");
}

$("camera").addEventListener("click", async (event) => {
  if (starting || event.detail > 1) return; // the second click of a double one would undo the first
  if (camera) return active.restart();
  starting = true;
  try {
    await startCamera();
  } catch (error) {
    toast(`No video from the camera: ${error.message}`, "bad");
    if (camera) active.restart();
  } finally {
    starting = false;
  }
});

let recorder = null;
$("record").addEventListener("click", () => {
  if (recorder) return recorder.stop();
  const stream = active.canvas.captureStream();
  const kind = ["video/mp4", "video/webm"].find((type) => MediaRecorder.isTypeSupported(type));
  const pieces = [], chip = active.element.querySelector(".rec");
  recorder = new MediaRecorder(stream, { mimeType: kind, videoBitsPerSecond: 8e6 });
  recorder.ondataavailable = ({ data }) => pieces.push(data);
  recorder.onstop = () => {
    recorder = null;
    chip.hidden = true;
    $("record").setAttribute("aria-pressed", "false");
    $("record").querySelector("span").textContent = "Record";
    offer(new Blob(pieces, { type: kind }), `world.${kind.split("/")[1]}`);
  };
  recorder.start();
  chip.hidden = false;
  $("record").setAttribute("aria-pressed", "true");
  $("record").querySelector("span").textContent = "Stop";
});

function offer(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Prompt history

function note(text) {
  const known = JSON.parse(localStorage.getItem("inferix.prompts") || "[]").filter((other) => other !== text);
  localStorage.setItem("inferix.prompts", JSON.stringify([text, ...known].slice(0, 20)));
  fillHistory();
}

function fillHistory() {
  const known = JSON.parse(localStorage.getItem("inferix.prompts") || "[]");
  const options = (texts) => texts.map((text) => new Option(text.length > 60 ? `${text.slice(0, 57)}...` : text, text));
  const group = (label, texts) => {
    const element = document.createElement("optgroup");
    element.label = label;
    element.append(...options(texts));
    return element;
  };
  $("history").replaceChildren(new Option("Examples and history", ""));
  if (known.length) $("history").append(group("Yours", known));
  if (model.examples.length) $("history").append(group("Examples", model.examples));
}

// Pictures of what is measured

function push(list, value) {
  list.push(value);
  if (list.length > POINTS) list.shift();
}

function drawStrip() {
  if (!active) return;
  const strip = $("strip");
  const there = new Map([...strip.children].map((item) => [item.entry, item]));
  const items = active.blocks.map((entry) => there.get(entry) || stripItem(entry));
  strip.replaceChildren(...items);
  for (const item of strip.querySelectorAll("button")) item.disabled = Number(item.dataset.block) < active.keptFrom;
  strip.scrollLeft = strip.scrollWidth;
}

function stripItem(entry) {
  const item = document.createElement("li");
  item.entry = entry;
  const choose = button("", () => quietly(command("rewind", { block: entry.block })));
  choose.dataset.block = entry.block;
  choose.setAttribute("aria-label", `Rewind to block ${entry.block}, at ${entry.seconds.toFixed(1)} seconds`);
  choose.title = `Rewind to block ${entry.block}`;
  choose.append(entry.thumbnail, `${entry.seconds.toFixed(1)} s`);
  item.append(choose);
  return item;
}

function drawMeters() {
  if (!active) return;
  const period = active.world.facts ? active.world.facts.frames_per_block / active.world.facts.media.fps : null;
  meter("meter-latency", active.latency, null, "dots");
  meter("meter-block", active.made, period, "bars");
  meter("meter-slack", active.slack, 0, "bars");
}

// limit: a value with a line of its own; bars beyond it are late.
function meter(id, values, limit, kind) {
  const element = $(id), canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const { width, height } = canvas, output = element.querySelector("output"), last = values.at(-1);
  const slack = id === "meter-slack";
  output.textContent = last === undefined ? "–" : Math.abs(last) < 1 ? `${Math.round(last * 1000)} ms` : `${last.toFixed(2)} s`;
  const late = (value) => limit !== null && (slack ? value < limit : value > limit);
  output.classList.toggle("late", last !== undefined && late(last));
  context.clearRect(0, 0, width, height);
  const top = Math.max(0.05, ...values, slack ? 0.05 : (limit || 0)) * 1.15, bottom = slack ? Math.min(0, ...values) * 1.15 : 0;
  const y = (value) => height - 2 - ((value - bottom) / (top - bottom)) * (height - 6), step = width / POINTS;
  context.fillStyle = colour("--line");
  context.fillRect(0, y(slack ? 0 : bottom), width, 2);
  values.forEach((value, index) => {
    const x = width - (values.length - index) * step;
    context.fillStyle = late(value) ? colour("--bad") : colour("--accent");
    if (kind === "bars") context.fillRect(x, Math.min(y(value), y(0)), step - 3, Math.max(2, Math.abs(y(value) - y(0))));
    else {
      context.beginPath();
      context.arc(x + step / 2, y(value), 5, 0, 7);
      context.fill();
    }
  });
  if (limit && kind === "bars") {
    context.fillStyle = colour("--soft");
    for (let x = 0; x < width; x += 12) context.fillRect(x, y(limit), 6, 2);
  }
}

function drawDrift(drift) {
  const entries = Object.entries(drift || {});
  $("drift").hidden = !entries.length;
  $("drift").replaceChildren(...entries.map(([name, change]) => {
    const row = document.createElement("div"), bar = document.createElement("progress");
    bar.max = 1;
    bar.value = Math.min(1, Math.abs(change));
    row.append(`Drift: ${name}`, bar, `${change > 0 ? "+" : ""}${Math.round(change * 100)} %`);
    return row;
  }));
}

function setStatus(kind, text) {
  $("status").dataset.kind = kind;
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

function button(text, click) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", click);
  return element;
}

function toast(text, kind = "", milliseconds = 5000, ...buttons) {
  const element = document.createElement("div");
  element.className = `toast ${kind}`;
  element.append(text, ...buttons);
  $("toasts").append(element);
  setTimeout(() => element.remove(), kind === "bad" ? 8000 : milliseconds);
}

$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("inferix.theme", document.documentElement.dataset.theme);
  drawMeters();
});

// Start: come back to a session, go on from a shared world, or open a new one

async function start() {
  if (localStorage.getItem("inferix.theme")) document.documentElement.dataset.theme = localStorage.getItem("inferix.theme");
  try {
    model = (await (await call("/v1/models")).json()).data[0];
  } catch (error) {
    return setStatus("bad", error.message);
  }
  $("facts").replaceChildren(...[model.id, `${model.size[0]}×${model.size[1]}`, `${model.fps} FPS`].map((text) => {
    const fact = document.createElement("span");
    fact.textContent = text;
    return fact;
  }));
  $("camera").hidden = !(model.video_in && navigator.mediaDevices);
  $("preset").replaceChildren(new Option(model.preset, model.preset));
  fillHistory();
  document.body.classList.toggle("camera", model.camera);
  makePad(model.camera ? Object.keys(KEYS) : model.actions);
  $("prompt").value = model.examples[0] || "";
  const pane = new Pane();
  activate(pane);
  const shared = new URLSearchParams(location.hash.slice(1)).get("world");
  const known = JSON.parse(sessionStorage.getItem("inferix.session") || "null");
  if (known) pane.begin({ type: "attach", ...known });
  else if (shared) pane.begin({ type: "open", world: shared });
  else pane.begin({ type: "open", prompt: $("prompt").value || "a quiet place", seed: seedValue() });
  window.inferix = { panes: () => panes, active: () => active };
}

start();
