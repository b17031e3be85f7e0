// Player: media messages of one stream to pictures on a canvas, at the video's rate.
// A message is a header of 16 bytes and a payload; docs/serving.md describes both.

const KINDS = { 1: "h264", 2: "vp9", 3: "fmp4", 4: "jpeg", 5: "raw" };
const KEY = 1, FIRST = 2;
const LONGEST_QUEUE = 3; // seconds of pictures; older ones are dropped, as after the page was in the background

export class Player {
  // canvas: where to draw. shown: called with {block, frame, first, canvas} for each picture drawn.
  constructor(canvas, shown) {
    this.canvas = canvas;
    this.shown = shown;
    this.context = canvas.getContext("2d", { alpha: false });
    this.queue = [];
    this.underruns = 0;
    this.decoding = Promise.resolve();
    this.next = 0;
    this.drawn = 0;
    this.closed = false;
    this.tick = this.tick.bind(this);
    requestAnimationFrame(this.tick);
  }

  // Set up for the format that the server chose.
  start(media) {
    this.media = media;
    this.period = 1000 / media.fps;
    const scale = media.width < 512 ? Math.max(1, Math.floor(768 / media.width)) : 1;
    this.canvas.width = media.width * scale;
    this.canvas.height = media.height * scale;
    this.context.imageSmoothingEnabled = media.width >= 256;
    this.stopDecoder();
    this.places = new Map();
    if (media.name === "h264" || media.name === "vp9") this.startDecoder(media);
    if (media.name === "fmp4") this.startSource(media);
  }

  startDecoder(media) {
    this.decoder = new VideoDecoder({
      output: (picture) => {
        const place = this.places.get(picture.timestamp);
        this.places.delete(picture.timestamp);
        this.add({ ...place, picture });
      },
      error: (error) => console.error("decoder", error),
    });
    this.decoder.configure({ codec: media.codec, optimizeForLatency: true });
    this.count = 0;
  }

  // MediaSource plays in a video element, whose pictures are copied to the canvas.
  startSource(media) {
    this.video = document.createElement("video");
    this.video.muted = true;
    this.video.playsInline = true;
    const source = new MediaSource();
    this.video.src = URL.createObjectURL(source);
    this.pieces = [];
    this.times = [];
    source.addEventListener("sourceopen", () => {
      this.buffer = source.addSourceBuffer(`video/mp4; codecs="${media.codec}"`);
      this.buffer.addEventListener("updateend", () => this.feed());
      this.feed();
    });
    const copy = (_, data) => {
      if (this.closed || !this.video) return;
      const index = Math.round(data.mediaTime * media.fps);
      const place = this.times[index] || { block: 0, frame: index };
      this.draw({ ...place, picture: this.video });
      this.video.requestVideoFrameCallback(copy);
    };
    this.video.requestVideoFrameCallback(copy);
  }

  feed() {
    if (!this.buffer || this.buffer.updating || !this.pieces.length) return;
    this.buffer.appendBuffer(this.pieces.shift());
    if (this.video.paused) this.video.play().catch(() => {});
    const buffered = this.video.buffered;
    if (buffered.length && buffered.end(0) - this.video.currentTime > 1.5) this.video.currentTime = buffered.end(0) - 0.2;
  }

  // Take one media message.
  take(message) {
    const view = new DataView(message);
    const place = {
      kind: KINDS[view.getUint8(0)], key: (view.getUint8(1) & KEY) !== 0, first: (view.getUint8(1) & FIRST) !== 0,
      rollout: view.getUint16(2, true), block: view.getUint32(4, true), frame: view.getUint32(8, true),
      frames: view.getUint32(12, true),
    };
    const data = new Uint8Array(message, 16);
    if (place.kind === "raw") {
      this.add({ ...place, picture: rawPicture(data, this.media) });
    } else if (place.kind === "jpeg") {
      const opened = createImageBitmap(new Blob([data], { type: "image/jpeg" }));
      this.decoding = this.decoding.then(async () => this.add({ ...place, picture: await opened }));
    } else if (place.kind === "fmp4") {
      for (let index = 0; index < place.frames; index++) this.times.push({ ...place, frame: place.frame + index, first: index === 0 });
      this.pieces.push(data);
      this.feed();
    } else if (this.decoder && this.decoder.state === "configured") {
      const timestamp = this.count++;
      this.places.set(timestamp, place);
      this.decoder.decode(new EncodedVideoChunk({ type: place.key ? "key" : "delta", timestamp, data }));
    }
  }

  add(entry) {
    this.queue.push(entry);
    while (this.queue.length * this.period > LONGEST_QUEUE * 1000) drop(this.queue.shift());
  }

  // Drop what is not shown yet: the stream goes on from another place.
  flush() {
    this.queue.forEach(drop);
    this.queue = [];
  }

  tick(now) {
    if (this.closed) return;
    requestAnimationFrame(this.tick);
    if (!this.period || !this.queue.length) {
      if (this.period && this.drawn && now > this.next + this.period && !this.starved) {
        this.starved = true;
        this.underruns++;
      }
      return;
    }
    if (now < this.next) return;
    this.starved = false;
    this.next = now - this.next > this.period ? now + this.period : this.next + this.period;
    const entry = this.queue.shift();
    this.draw(entry);
    drop(entry);
  }

  draw(entry) {
    this.context.drawImage(entry.picture, 0, 0, this.canvas.width, this.canvas.height);
    this.drawn++;
    this.shown(entry);
  }

  stopDecoder() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    this.decoder = null;
    if (this.video) URL.revokeObjectURL(this.video.src);
    this.video = this.buffer = null;
    this.flush();
  }

  close() {
    this.closed = true;
    this.stopDecoder();
  }
}

function drop(entry) {
  if (entry && entry.picture && entry.picture.close) entry.picture.close();
}

function rawPicture(data, media) {
  const canvas = new OffscreenCanvas(media.width, media.height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(media.width, media.height);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) {
    image.data[to] = data[from];
    image.data[to + 1] = data[from + 1];
    image.data[to + 2] = data[from + 2];
    image.data[to + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
