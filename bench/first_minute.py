"""Ten numbers of a card in its first minute: one process, one trace, a JSON file that is written after every line.

unproved: forms that no card has run yet, each in a process of its own. card: copy and matmul. attention, scattered:
block attention over a full window in one run and in many, every other form that serves, beside torch's over the store
as it lies. matmul, fp8: the linear layers. fused: norms and rotary embedding.
graph: trace, capture, and captured against fused and eager. block: time of a block, of its kernels, and between them.
vae, taehv: decoding a block. captured: nodes of the block's graph against the calls of its program. An error in a line
is written down with the line, and the next one runs.

On a CPU and a small model it runs end to end, which shows that it works and nothing else.

Run: python -m inferix.bench.first_minute --out outputs/first-minute.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from ..errors import InferixError, one_line_errors
from ..kernels.block_attention.reference import sizes as attention_sizes
from ..kernels.catalog import SPECS
from ..kernels.linear_gelu import linear_gelu
from ..kernels.linear_lowp import pack
from ..kernels.spec import FP8, Case, KernelSpec, architecture
from ..models.decoder import Decoder, StreamState
from ..models.registry import family_of
from ..runtime.config import default_device
from ..runtime.engine import Engine
from ..runtime.execution.executors import Executor, GraphExecutor
from ..runtime.executor_specs import EXECUTORS
from ..runtime.files import check_output, write_atomically
from ..schemes.page_needs import window
from .candidates import TOLERANCE, EngineStream, outputs_of, relative_difference
from .captured_check import check_executor, faults_of
from .form_check import check_apart, unproved_forms
from .inspection import count_launches
from .kernels import clone_inputs, launch_errors, mismatch
from .machine import environment, measure_ceilings, stopwatch, synchronize
from .result import CHECK
from .rivals import bound, flash_packages
from .subject import ORACLE, Subject, draw_weights, open_engine, random_prompt, with_executor
from .work import blocks_until_full

REPEATS = 7
FUSED = ("adaln", "qk_norm_rope_append", "rms_norm")


@dataclass
class Run:
    """State shared by the lines: the subject, one engine, and its prompt.

    known: values of the lines before. executor: of the timed block, whose graphs are captured.
    """

    subject: Subject
    device: str
    known: dict[str, Any] = field(default_factory=dict)
    executor: Executor | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @cached_property
    def engine(self) -> Engine:
        return open_engine(self.subject)

    @cached_property
    def rows(self) -> Tensor:
        return random_prompt(self.engine, self.subject.seed)

    @cached_property
    def dims(self) -> dict[str, int]:
        """Sizes of the block's attention: frames, tokens of a frame, pages of a full window, heads, dim, width."""
        spec, preset = self.engine.spec, self.engine.preset
        height, columns = spec.latent_size(self.subject.size or self.engine.default_size)
        return {
            "frames": preset.num_frame_per_block, "page_tokens": height * columns // (spec.patch[0] * spec.patch[1]),
            "pages": window(preset), "heads": spec.num_heads, "kv_heads": spec.kv_heads, "dim": spec.head_dim,
            "width": spec.dim, "ffn": spec.ffn_dim,
        }  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.dims["frames"] * self.dims["page_tokens"]

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Median time of a call, on a card after two that warm up."""
        samples, (first, repeats) = [], (2, REPEATS) if self.on_gpu else (0, 1)
        for index in range(first + repeats):
            with stopwatch(self.device) as elapsed:
                call()
            if index >= first:
                samples.append(elapsed())
        return statistics.median(samples) * 1e3

    def timed(self, call: Callable[[], object], result: Callable[[], Tensor], expected: Tensor) -> float | str:
        """Median time of a call whose result is the expected one, else how far it is off."""
        call()
        off, most = relative_difference(result(), expected), TOLERANCE[self.engine.dtype]
        return self.milliseconds(call) if off <= most else f"off by {off:.1e}, allowed {most:.1e}"

    def stream(self, executor: str) -> EngineStream:
        engine = with_executor(self.engine, executor)
        return EngineStream(engine, self.rows, self.subject.seed, self.subject.size or engine.default_size)


def card(run: Run) -> dict[str, Any]:
    """Copy and matmul of the machine."""
    ceilings = measure_ceilings(run.device, run.engine.dtype)
    return {"copy_gb_s": ceilings["copy_bytes"].median / 1e9, "matmul_tflops": ceilings["matmul_flops"].median / 1e12}


def serving(run: Run, spec: KernelSpec, inputs: Mapping[str, Any]) -> dict[str, Callable[..., None]]:
    """Forms of an op for a call on the run's device."""
    if run.on_gpu:
        return {form.name: form.load() for form in spec.serving(architecture(inputs[spec.like].device), inputs)}
    return {form.name: form.load() for form in spec.implementations if form.cpu} or {"reference": spec.reference}


def expected_of(spec: KernelSpec, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call as the reference leaves them."""
    expected = clone_inputs(inputs)
    spec.reference(**expected)
    return expected


def timed_forms(run: Run, spec: KernelSpec, inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each form that agrees with the reference, the reason of each that does not."""
    results: dict[str, Any] = {}
    for name, form in serving(run, spec, inputs).items():
        wrong = mismatch(spec, bound(form), inputs, expected, inputs[spec.like].dtype)
        results[name] = wrong or run.milliseconds(partial(form, **clone_inputs(inputs)))
    return results


def unproved(run: Run) -> dict[str, Any]:
    """Forms that no card has run, each in a process of its own: milliseconds by case, or the cases that are wrong."""
    results: dict[str, Any] = {}
    for spec, form in unproved_forms():
        name = f"{spec.name}, {form.name}"
        if not run.on_gpu or architecture(torch.device(run.device)) not in form.architectures:
            results[name] = f"is for sm_{', '.join(map(str, form.architectures))}"
            continue
        try:
            facts = check_apart(spec.name, form.name, run.device)
        except InferixError as error:
            results[name] = first_line(error)
            continue
        results |= {f"{name}, {case}": ms for case, ms in facts["ms"].items()}
        results[name] = f"{facts['checked'] - len(facts['wrong'])} of {facts['checked']} cases are right"
        results |= {f"{name}, {case}": reason for case, reason in facts["wrong"].items()}
    return results


def attention(order: str, run: Run) -> dict[str, Any]:
    """Block attention of a block at a full window; its pages in one run, or shuffled."""
    spec, dims = SPECS["block_attention"], run.dims
    shape = attention_sizes(
        1, run.tokens, dims["pages"], dims["page_tokens"], dims["heads"], dims["kv_heads"], dims["dim"]
    )
    inputs = spec.make_inputs(Case(order, shape, {"order": order}), run.engine.dtype, run.device, 0)
    flops = 4 * run.tokens * dims["heads"] * dims["dim"] * dims["pages"] * dims["page_tokens"]
    expected = expected_of(spec, inputs)
    results = timed_forms(run, spec, inputs, expected)
    if order == "one" and run.on_gpu:
        results |= over_the_store(run, inputs, expected["out"])
    rates = {f"{name} tflops": flops / ms / 1e9 for name, ms in results.items() if isinstance(ms, float)}
    return results | rates


def over_the_store(run: Run, inputs: Mapping[str, Any], expected: Tensor) -> dict[str, Any]:
    """Milliseconds of torch's attention, by backend, and of each flash-attn, over pages that are one run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    count, first = int(inputs["page_count"][0]), int(inputs["page_table"][0, 0])
    q = inputs["q"].transpose(1, 2)
    k, v = (part[first : first + count].flatten(0, 1)[None].transpose(1, 2) for part in inputs["kv"])
    rivals: dict[str, Callable[[], Any]] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def attend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
            return attended.transpose(1, 2)

        rivals[f"sdpa {backend.name.lower()}"] = attend
    for name, function in flash_packages():
        rivals[name] = partial(first_result, function, *(part.transpose(1, 2) for part in (q, k, v)))
    results: dict[str, Any] = {}
    for name, call in rivals.items():
        try:
            results[name] = run.timed(call, call, expected)
        except launch_errors() as error:
            results[name] = first_line(error)
    return results


def first_result(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that may return others beside it."""
    returned = function(*args)
    return returned[0] if isinstance(returned, tuple) else returned


def matmuls(run: Run) -> dict[str, tuple[int, int]]:
    """Inner and outer sizes of a layer's matmuls over the tokens of a block."""
    width, ffn, heads = run.dims["width"], run.dims["ffn"], run.dims["heads"] * run.dims["dim"]
    kv = 2 * run.dims["kv_heads"] * run.dims["dim"]
    return {"qkv": (width, heads + kv), "o": (heads, width), "ffn up": (width, ffn), "ffn down": (ffn, width)}


def matmul(run: Run) -> dict[str, Any]:
    """Linear layers of a block as its program calls them."""
    results = {}
    for name, (inner, outer) in matmuls(run).items():
        x = torch.randn(run.tokens, inner, device=run.device).to(run.engine.dtype)
        weight = torch.randn(outer, inner, device=run.device).to(run.engine.dtype)
        bias = torch.zeros(outer, device=run.device, dtype=run.engine.dtype)
        out = torch.empty(run.tokens, outer, device=run.device, dtype=run.engine.dtype)
        call: Callable[[], object] = partial(torch.addmm, bias, x, weight.T, out=out)
        expected = x.float() @ weight.float().T
        if name == "ffn up":
            call = partial(linear_gelu, x, weight, bias, out=out)
            expected = F.gelu(expected, approximate="tanh")
        results[name] = ms = run.timed(call, lambda out=out: out, expected)  # type: ignore[misc]
        if isinstance(ms, float):
            results[f"{name} tflops"] = 2 * run.tokens * inner * outer / ms / 1e9
    return results


def fp8(run: Run) -> dict[str, Any]:
    """The widest linear layers on FP8 operands, scales by row, fast accumulation off and on."""
    results = {}
    for name in ("ffn up", "ffn down"):
        inner, outer = matmuls(run)[name]
        x, x_scale = pack(torch.randn(run.tokens, inner, device=run.device), FP8)
        weight, scale = pack(torch.randn(outer, inner, device=run.device), FP8)
        expected = (x.float() * x_scale[:, None]) @ (weight.float() * scale[:, None]).T
        for fast in (False, True):
            call = partial(
                torch._scaled_mm, x, weight.T, scale_a=x_scale[:, None], scale_b=scale[None],
                out_dtype=torch.bfloat16, use_fast_accum=fast,
            )  # fmt: skip
            results[f"{name}{', fast sums' if fast else ''}"] = run.timed(call, call, expected)
    return results


def fused(run: Run) -> dict[str, Any]:
    """Norms and rotary embedding: correct, and GB/s."""
    results = {}
    for op in FUSED:
        spec = SPECS[op]
        case = spec.bench_cases[0] if run.on_gpu else spec.test_cases[1]
        inputs = spec.make_inputs(case, run.engine.dtype if run.on_gpu else torch.float32, run.device, 0)
        for form, result in timed_forms(run, spec, inputs, expected_of(spec, inputs)).items():
            results[f"{op}, {form}"] = result
            if isinstance(result, float):
                results[f"{op}, {form} gb_s"] = spec.cost(inputs).nbytes / result / 1e6
    return results


def graph(run: Run) -> dict[str, Any]:
    """Latents of fused against eager, and of captured against fused bit for bit, up to a full window."""
    full = blocks_until_full(run.engine.preset)
    names = [name for name in ("fused", "captured") if run.engine.device.type in EXECUTORS[name].devices]
    outputs = {}
    for name in (ORACLE, *names):
        begun = time.perf_counter()
        outputs[name] = outputs_of(run.stream(name), [False] * (full + 1))
        run.known[f"{name} seconds"] = time.perf_counter() - begun
    pairs = zip(outputs["fused"], outputs[ORACLE], strict=True)
    results: dict[str, Any] = {
        f"{name} seconds of {full + 1} blocks": run.known[f"{name} seconds"] for name in outputs
    } | {"fused off by": max(relative_difference(one.latents, other.latents) for one, other in pairs)}
    if "captured" in outputs:
        same = zip(outputs["captured"], outputs["fused"], strict=True)
        results["captured equals fused"] = all(torch.equal(one.latents, other.latents) for one, other in same)
    return results


def block(run: Run) -> dict[str, Any]:
    """Milliseconds of a block at a full window, host and card; of its kernels; and of what lies between."""
    name = "captured" if run.on_gpu else "fused"
    stream = run.stream(name)
    for _ in range(blocks_until_full(run.engine.preset) + 1):
        stream.step(decode=False)
    samples = []
    for _ in range(3):
        synchronize(run.device)
        begun = time.perf_counter()
        stream.step(decode=False)
        synchronize(run.device)
        samples.append((time.perf_counter() - begun) * 1e3)
    results: dict[str, Any] = {"ms": statistics.median(samples), "executor": name}
    if run.on_gpu:
        results |= kernels_of(run, stream, results["ms"])
    run.executor = stream.session.manager.resources.executor
    stream.close()
    return results


def kernels_of(run: Run, stream: EngineStream, ms: float) -> dict[str, Any]:
    """Launches of the next block, milliseconds of its kernels by name, the longest first, and the rest of `ms`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        stream.step(decode=False)
        synchronize(run.device)
    events = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events) / 1e3
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:12]
    launches = count_launches(event.name for event in profiled.events())
    return {
        "kernels ms": total, "between ms": ms - total, **launches,
        "longest": {event.key[:80]: event.self_device_time_total / 1e3 for event in longest},
    }  # fmt: skip


def decoder(tiny: bool, run: Run) -> dict[str, Any]:
    """Decoding a block of a running stream with plain layers, and with the fast layers of the device from its state."""
    spec, dtype = run.engine.spec, run.engine.dtype
    family = family_of(spec)
    with torch.device("meta"):
        module = family.build_decoder(family.chosen_decoder_spec(spec, tiny))
    module = draw_weights(module, 1, dtype, run.device)
    height, width = spec.latent_size(run.subject.size or run.engine.default_size)
    latents = torch.randn(run.dims["frames"], spec.out_channels, height, width, device=run.device).to(dtype)
    results: dict[str, Any] = {}
    with torch.no_grad():
        state = module.new_state()
        module.decode(latents, state)
        plain = partial(decode_next, module, latents, state)
        expected = plain()
        results["plain ms"] = run.timed(plain, plain, expected)
        fast = partial(decode_next, family.with_fast_layers(module), latents, state)
        results["fast ms"] = run.timed(fast, fast, expected)
    return results


def decode_next(module: Decoder, latents: Tensor, state: StreamState) -> Tensor:
    return module.decode(latents, state.clone())


def captured(run: Run) -> dict[str, Any]:
    """Nodes of the timed block's graphs, and their faults against the calls of the programs."""
    if not run.on_gpu:
        return {"captured": "needs a GPU"}
    assert isinstance(run.executor, GraphExecutor), "no block was timed"
    results = check_executor(run.executor)
    faults = faults_of(results)
    return {
        "graphs": len(results), "faults": len(faults), "first faults": faults[:20],
        **{name: {key: facts[key] for key in ("calls", "nodes", "kinds")} for name, facts in results.items()},
    }  # fmt: skip


LINES: dict[str, tuple[Callable[[Run], dict[str, Any]], float]] = {  # with the seconds each should take on a card
    "unproved": (unproved, 25),
    "card": (card, 8),
    "attention": (partial(attention, "one"), 12),
    "scattered": (partial(attention, "shuffled"), 4),
    "matmul": (matmul, 2),
    "fp8": (fp8, 2),
    "fused": (fused, 6),
    "graph": (graph, 30),
    "block": (block, 12),
    "vae": (partial(decoder, False), 10),
    "taehv": (partial(decoder, True), 4),
    "captured": (captured, 4),  # the last, since it reads the driver's memory
}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def run_lines(run: Run, file: Path, lines: Mapping[str, tuple[Callable[[Run], dict[str, Any]], float]]) -> bool:
    """Run each line and write the file after it; returns True if none had an error."""
    results: dict[str, Any] = {}
    for name, (line, expected) in lines.items():
        begun = time.perf_counter()
        print(f"{name} (about {expected:.0f} s on a card)", flush=True)
        try:
            results[name] = {"values": line(run)}
        except Exception as error:  # a line that breaks in any way must cost no other: time on a card is short
            results[name] = {"error": first_line(error)}
        results[name] |= {"seconds": time.perf_counter() - begun, "expected_seconds": expected}
        print(f"  {shown(results[name])}", flush=True)
        facts = {CHECK: True, "environment": environment(run.device), "dims": run.dims, "lines": results}
        write_atomically(file, lambda part, facts=facts: part.write_text(json.dumps(facts, indent=1) + "\n", "utf-8"))  # type: ignore[misc]
    return not any("error" in result for result in results.values())


def shown(result: Mapping[str, Any]) -> str:
    """One line of text for a result."""
    if "error" in result:
        return f"failed: {result['error']}"
    words = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in result["values"].items()]  # fmt: skip
    return f"{'; '.join(words)} ({result['seconds']:.1f} s)"


def main(
    out: Annotated[Path, typer.Option(help="File for the results.")] = Path("outputs/first-minute.json"),
    model: Annotated[str, typer.Option(help="Name of a model; its weights are random.")] = "wan-1.3b",
    preset: Annotated[str, typer.Option(help="Named scheme.")] = "self-forcing",
    device: Annotated[str | None, typer.Option(help="[default: cuda if there is one, else cpu]")] = None,
    graphs: Annotated[str | None, typer.Option(help="Folder of stored graphs, to trace nothing.")] = None,
) -> None:
    """Run the lines in order; exit code 1 if one had an error."""
    device = device or default_device()
    check_output(out)
    subject = Subject(model, preset, random_weights=True, device=device, executor="fused", graphs=graphs)
    if not run_lines(Run(subject, device), out, LINES):
        raise typer.Exit(1)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
