"""Speed goals as data, with the commands that measure them. A goal is not a measurement.

Each goal is for one GPU, size and configuration. The report shows it only beside a GPU result of that configuration.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from ..models.registry import MODELS, PRESETS, family_of
from ..runtime.capacity.gpus import CARDS
from ..runtime.config import EVERY_BLOCK
from ..runtime.executor_specs import EXECUTORS
from ..runtime.sampler import scheduled_blocks
from .result import Result, as_in_a_file
from .work import blocks_until_full, decoder_work, pass_work

CARD = "NVIDIA H200"
PEAK_OF = {CARD: "h200"}  # names in the table of cards


class Reached(NamedTuple):
    """A result's value of a goal's quantity. by: the executor, and other figures to show with it."""

    value: float
    by: str = ""


@dataclass(frozen=True)
class Goal:
    """At most `value` of `quantity` on `card`; exactly `value` of `graphs`, since a failed capture launches none.

    quantity: a series of an executor (`block`, `interval`, `transformer`, `decode`), `graphs` launched, a start's
    series, or `attention`: our kernel's time over that of the best of torch's in the same run. bits: precision of
    layers and pages, where it is not the model's dtype. predicted: by the dry run's model of time, in the goal's unit.
    public: strongest published figure, its GPU and what its clock covers.
    """

    name: str
    model: str
    preset: str
    quantity: str
    value: float
    command: str
    window: int | None = None
    decoder: str | None = None
    dtype: str = "bfloat16"
    size: tuple[int, int] = (832, 480)
    card: str = CARD
    unit: str = "s"
    bits: dict[str, str] = field(default_factory=dict)
    predicted: float | None = None
    public: str = ""

    @property
    def floor(self) -> float | None:
        """Least seconds of the work at the maker's peak rates of the card; None for goals that are no such work."""
        parts = {"transformer": (True, False), "decode": (False, True), "interval": (True, True)}
        if self.quantity not in parts or self.bits:
            return None
        peak, least = CARDS[PEAK_OF[self.card]], 0.0
        spec, preset = MODELS[self.model], PRESETS[self.preset]
        plan = next(islice(scheduled_blocks(preset), blocks_until_full(preset), None))
        works = [pass_work(spec, one.run, self.size, self.dtype) for one in plan.passes]
        transformer, decode = parts[self.quantity]
        if decode:
            family = family_of(spec)
            sizes = family.chosen_decoder_spec(spec, self.decoder == "TinyDecoder")
            works.append(decoder_work(sizes, spec.latent_size(self.size), len(plan.span.frames), self.dtype))
        for work in works if transformer else works[-1:]:
            least += max(work.flops / (peak.tflops * 1e12), work.nbytes / (peak.bandwidth * 1e9))
        return least

    @property
    def kind(self) -> str:
        kinds = {"first frame, stored": "stream", "attention": "kernels"}
        return kinds.get(self.quantity, "block")

    @property
    def exact(self) -> bool:
        return self.quantity == "graphs"

    def matches(self, result: Result) -> bool:
        """Return True for a result of exactly this configuration, on any GPU."""
        if result.kind != self.kind or not result.on_gpu:
            return False
        if self.kind == "kernels":
            return bool(result.settings["dtype"] == self.dtype)
        config = result.settings["config"]
        bits = {"lowp": None, "kv_dtype": None, "lowp_layers": EVERY_BLOCK, "lowp_keep": ()} | self.bits
        return (
            result.subject["model"] == self.model
            and bool(result.subject["random_weights"])
            and choices(result.settings["preset"]) == choices(asdict(PRESETS[self.preset]))
            and result.settings["size"] == list(self.size)
            and config["dtype"] == self.dtype
            and (self.window is None or result.facts["block"]["window_frames"] == self.window)
            and (self.decoder is None or result.subject["decoder"] == self.decoder)
            and as_in_a_file({key: config[key] for key in bits}) == as_in_a_file(bits)
        )

    def on_its_card(self, result: Result) -> bool:
        """Return True for a result of the whole GPU; a MIG slice, such as `NVIDIA H200 MIG 1g.18gb`, is another one."""
        return self.card == result.device_name

    def met_by(self, value: float) -> bool:
        return value == self.value if self.exact else value <= self.value

    def reached(self, result: Result) -> Reached | None:
        """Value of a result's fastest executor; None if it was not measured.

        Only executors in low precision reach a goal of low precision.
        """
        if self.kind == "kernels":
            return attention_ratio(result)
        if self.kind == "stream":
            series = result.series.get(f"start/{self.quantity}")
            return None if series is None else Reached(series.median, result.settings["config"]["executor"])
        for name in reversed(EXECUTORS):  # baselines reach no goal
            candidate = result.facts["candidates"].get(name)
            if candidate is None or candidate["refused"] or (self.bits and not candidate.get("fewer_bits")):
                continue
            if self.quantity == "graphs":
                if name != "captured" or not (launches := candidate.get("launches")):
                    return None
                return Reached(launches["graphs"], f"captured, {launches['kernels']} kernels beside")
            if series := result.of(name).get(self.quantity):
                return Reached(series.median, name)
        return None


def choices(preset: dict[str, Any]) -> Any:
    """All fields of a preset except its credits, as JSON reads them."""
    return as_in_a_file({key: value for key, value in preset.items() if key != "about"})


def attention_ratio(result: Result) -> Reached | None:
    """Time of our attention at a full window over the best of torch's; None if either was not timed."""
    for row in result.facts["rows"]:
        if (row["op"], row["case"]) == ATTENTION:
            seconds = {name: form["seconds"] for name, form in row["forms"].items() if "seconds" in form}
            theirs = [value for name, value in seconds.items() if name.startswith("sdpa")]
            return Reached(seconds["triton"] / min(theirs)) if theirs and "triton" in seconds else None
    return None


ATTENTION = ("block_attention", "1.3B, full window")
RUN = "inferix bench block --random-weights --model"
SELF_FORCING = f"{RUN} wan-1.3b --preset self-forcing"
START = "inferix bench stream --random-weights --model wan-1.3b --preset self-forcing"
GOALS = (
    Goal("1.3B Self-Forcing, window 21: transformer", "wan-1.3b", "self-forcing", "transformer", 0.32,
         SELF_FORCING, window=21, predicted=0.395,
         public="0.344 s, H100: four denoising passes, no commit (FlashDreams, 2026-05)"),
    # both have the whole card, so their times add up
    Goal("1.3B Self-Forcing, window 21: with the Wan VAE", "wan-1.3b", "self-forcing", "interval", 0.42,
         SELF_FORCING, window=21, decoder="CausalVae", predicted=0.497,
         public="0.356 s, GPU not named: passes 0.188, decoder 0.133, commit 0.035 (FlashDreams, pull request 148)"),
    Goal("1.3B Self-Forcing, window 21: with TAEHV", "wan-1.3b", "self-forcing", "interval", 0.33,
         f"{SELF_FORCING} --vae taehv", window=21, decoder="TinyDecoder", predicted=0.401,
         public="0.449 s for each of 5 H200 (133.7 FPS): five passes, no text, no decoder (vLLM-Omni, 2026-10)"),
    Goal("1.3B LongLive, window 12, sink 3: transformer", "wan-1.3b", "longlive", "transformer", 0.225,
         f"{RUN} wan-1.3b --preset longlive", window=12, predicted=0.277,
         public="0.41 s (29 FPS), H200: with keys and values pruned by head (Forcing-KV, 2026-05)"),
    Goal("14B Krea, 3 recomputed frames and 4 passes of 6: transformer", "wan-14b", "krea", "transformer", 1.15,
         f"{RUN} wan-14b --preset krea", predicted=1.249,
         public="2.8 s (4.3 FPS), H100: compiled, the application's frame rate (Scope, pull request 55)"),
    Goal("Wan VAE: streaming decode of a 3-frame block", "wan-1.3b", "self-forcing", "decode", 0.10,
         SELF_FORCING, decoder="CausalVae", predicted=0.102,
         public="0.133 s, GPU not named: the decoder alone (FlashDreams, pull request 148)"),
    # FP8 pages save memory, no time: attention multiplies in half precision, and takes two thirds of a block
    Goal("1.3B Self-Forcing, window 21, FP8 linears and pages: transformer", "wan-1.3b", "self-forcing",
         "transformer", 0.30, f"{SELF_FORCING} --set lowp=fp8 --set kv_dtype=fp8", window=21,
         bits={"lowp": "fp8", "kv_dtype": "fp8"}, predicted=0.428,
         public="0.354 s (33.9 FPS), H100: FP8, sparse attention and a light decoder (Light Forcing, 2026-05)"),
    Goal("block attention, 4680 queries, 32760 keys, 12 heads of 128, against the best of torch's", "wan-1.3b",
         "self-forcing", "attention", 1.0, "inferix bench kernels --op block_attention --out results",
         unit="x its time"),
    Goal("graphs launched in a block at a full window", "wan-1.3b", "self-forcing", "graphs", 1,
         SELF_FORCING, window=21, unit="graph"),
    Goal("first block after the start of a process, from stored artefacts, weights drawn on the card", "wan-1.3b",
         "self-forcing", "first frame, stored", 10, START,
         public="37.6 s, GPU not named: a first block that compiles (FlashDreams, pull request 148)"),
)  # fmt: skip
