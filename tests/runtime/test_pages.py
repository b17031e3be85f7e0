"""Sessions in pages against the contiguous cache, in every form, dtype and place that pages can have."""

import copy
import dataclasses
import random

import pytest
import torch
from oracles import KINDS, ROWS, SIZE, TOKENS, contiguous, make_engine, page_tensors

from inferix.errors import InferixError, UsageError
from inferix.runtime.byte_sizes import format_bytes, parse_bytes
from inferix.runtime.kv.contiguous_cache import BoundCache, ContiguousCache
from inferix.runtime.kv.page_layout import layout_pass as LAYOUT_PASS
from inferix.runtime.kv.pages import OutOfPages, PagePool
from inferix.schemes.context import ContextPolicy
from inferix.schemes.page_needs import page_needs

OTHER = ROWS.flip(0) * 1.5
BLOCKS = {  # (blocks, overrides that make the window roll or the context restart within them)
    "self-forcing": (5, {"local_attn_size": 9}),
    "self-forcing-framewise": (5, {"local_attn_size": 3}),
    "causal-forcing": (9, {}),
    "causvid": (5, {"segment_frames": 9}),
    "longlive": (7, {}),
    "longlive-infinity": (7, {}),
    "krea": (3, {}),
    "longlive2": (7, {"local_attn_size": 12, "sink_size": 2, "num_frame_per_block": 2}),
    "rolling-forcing": (8, {}),
    "causal-diffusion": (4, {"num_steps": 2, "local_attn_size": 6}),
    "tinyworld": (11, {}),
    "causal-forcing-2step": (5, {"local_attn_size": 3}),
    "sgf-plus": (5, {"num_frame_per_block": 1, "local_attn_size": 4, "sink_size": 1}),
    "self-forcing-a14b": (4, {"num_frame_per_block": 1, "local_attn_size": 3}),
}


class Scattered(PagePool):
    """Hands out any free pages."""

    def acquire(self, count, reuse=(), after=None, room=0):
        self.require(count)
        taken = random.Random(len(self.free)).sample(sorted(self.free), count)
        self._take(taken, count, [])
        return taken


def stream(engine, blocks, **kwargs):
    """Latents of blocks with a new prompt half-way, a scene cut where there are scenes, and an image to begin with."""
    extra = {"negative_embeds": OTHER.to(engine.dtype)} if engine.preset.sampler.guidance_scale != 1 else {}
    if engine.preset.context.image == "clamp":
        extra["image"] = torch.arange(32 * 32 * 3).view(32, 32, 3).to(torch.uint8).numpy()
    with engine.open(prompt_embeds=ROWS.to(engine.dtype), size=SIZE, **extra, **kwargs) as session:
        made = list(session.stream(blocks // 2, decode=False))
        session.prompt(embeds=OTHER.to(engine.dtype))
        session.current.timeline.cut_shot()
        made += session.stream(blocks - blocks // 2, decode=False)
        if engine.kv_manager.stores:
            caches = [branch.cache for branch in session.current.branches]
            store = caches[0].store
            store.pool.check_integrity([cache.table for cache in caches])
            needs = page_needs(engine.preset)
            assert store.pool.size == len(caches) * needs.total  # what one session needs, and no growth
            assert max(len(cache.frames) for cache in caches) <= needs.context
    assert all(store.pool.used == 0 for store in engine.kv_manager.stores.values())
    return torch.cat([block.latents for block in made])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_pages_equal_the_contiguous_cache(name, monkeypatch):
    """In float64, with pages in runs and with pages anywhere."""
    blocks, overrides = BLOCKS[name]
    expected = stream(contiguous(make_engine(name, **overrides)), blocks)
    assert (stream(make_engine(name, **overrides), blocks) - expected).abs().max() <= 1e-10
    monkeypatch.setattr("inferix.runtime.kv.page_space.PagePool", Scattered)
    assert (stream(make_engine(name, **overrides), blocks) - expected).abs().max() <= 1e-10


@torch.no_grad()
def test_a_wrong_page_or_place_does_not_go_unseen(monkeypatch):
    """The same comparison fails where a sink is seen at the distance it was stored at, or a page is another's."""
    expected = stream(contiguous(make_engine("longlive-infinity")), 7)
    with monkeypatch.context() as patch:
        patch.setattr(
            "inferix.runtime.kv.paged_cache.layout_pass",
            lambda *args: [dataclasses.replace(row, sink_positions=row.positions) for row in LAYOUT_PASS(*args)],
        )
        assert (stream(make_engine("longlive-infinity"), 7) - expected).abs().max() > 1e-6
    monkeypatch.setattr(
        "inferix.runtime.kv.paged_cache.layout_pass",
        lambda *args: [dataclasses.replace(row, listed=row.listed[1:] + row.listed[-1:]) for row in LAYOUT_PASS(*args)],
    )
    assert (stream(make_engine("longlive-infinity"), 7) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["longlive", "longlive-infinity"])
@torch.no_grad()
def test_a_fork_shares_pages_until_it_writes_them(name):
    """One fork recaches shared frames under a new prompt; both continue as a session without forks does."""
    blocks = 5  # the window has rolled, so that the sink is kept

    def single(switch):
        with make_engine(name).open(prompt_embeds=ROWS, size=SIZE) as session:
            list(session.stream(blocks, decode=False))
            if switch:
                session.prompt(embeds=OTHER)
            return torch.cat([block.latents for block in session.stream(3, decode=False)])

    engine = make_engine(name)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(blocks, decode=False))
        table = session.current.branches[0].cache.table
        pool = table.pool
        used = pool.used
        with session.fork() as other:
            shared = set(table.pages.values())
            assert pool.used == used and set(other.current.branches[0].cache.table.pages.values()) == shared
            other.prompt(embeds=OTHER)
            changed = torch.cat([block.latents for block in other.stream(3, decode=False)])
            pool.check_integrity([session.current.branches[0].cache.table, other.current.branches[0].cache.table])
            own = set(other.current.branches[0].cache.table.pages.values())
            assert len(own & shared) == 3 and pool.used == len(own | shared)  # the sink is shared still
            plain = torch.cat([block.latents for block in session.stream(3, decode=False)])
        assert pool.used == len(table.pages)
    assert torch.equal(changed, single(True)) and torch.equal(plain, single(False))
    assert not torch.equal(changed, plain)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("given", [None, "fp8"])
@torch.no_grad()
def test_pages_go_to_the_host_and_back(given, monkeypatch):
    """Bit for bit, with what forks share still shared; others use the pages meanwhile."""
    expected = stream(make_engine("longlive", "float32", kv_dtype=given), 6)
    engine = make_engine("longlive", "float32", kv_dtype=given)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        made = list(session.stream(3, decode=False))
        cache = session.current.branches[0].cache
        with session.fork() as other:
            there = other.current.branches[0].cache
            before = cache.export_pages()
            cache.offload(there)
            pool, used = cache.store.pool, len(before.frames)
            assert pool.used == 0 and cache.frames == before.frames and cache.nbytes == 0
            assert torch.equal(raw(cache.export_pages().kv), raw(before.kv))
            with pytest.raises(InferixError, match="in host memory"):
                cache.set_window(cache.frames)
            taken = pool.acquire(pool.size)
            for tensor in page_tensors(engine).kv:
                tensor.view(torch.uint8).fill_(77)
            cache.store.grows = False
            with pytest.raises(OutOfPages):
                cache.prefetch()
            cache.store.grows = True
            pool.release(taken)
            with monkeypatch.context() as patch:
                patch.setattr(page_tensors(engine), "write", out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    cache.prefetch()
                assert pool.used == 0
            cache.prefetch()
            cache.onload()
            cache.onload()
            assert pool.used == used and there.offloaded is None and there.frames == cache.frames
            pool.check_integrity([cache.table, there.table])
            assert torch.equal(raw(there.export_pages().kv), raw(before.kv))
        session.prompt(embeds=OTHER.float())
        made += session.stream(3, decode=False)
        with session.fork() as other:
            there = other.current.branches[0].cache
            cache.offload(there)
            there.release()
            cache.onload()
            pool.check_integrity([cache.table])
            cache.offload()
    assert pool.used == 0
    assert torch.equal(torch.cat([block.latents for block in made]), expected)


@torch.no_grad()
def test_a_paused_session_lends_its_pages_to_others():
    """Two sessions alternate in memory for one, each bit-equal to a single session; one is rewound while offloaded."""
    settings = {"rewind_blocks": 1, "denoising_step_list": [1000, 500], "local_attn_size": 6, "sink_size": 0}
    single = stream_of(make_engine("self-forcing", "float32", **settings), 6)
    pages = page_needs(make_engine("self-forcing", "float32", **settings).preset).total
    engine = make_engine("self-forcing", "float32", kv_memory=pages * 4096, kv_offload=True, **settings)
    kwargs = {"prompt_embeds": ROWS.float(), "size": SIZE}
    one = engine.open(**kwargs)
    made = [block.latents for block in one.stream(3, decode=False)]
    with pytest.raises(InferixError, match="are reserved"):
        engine.open(**kwargs)
    one.pause()
    engine.step()
    pool = engine.kv_manager.store(SIZE).pool
    assert pool.used == 0
    with pytest.raises(InferixError, match="resume"):
        one.fork()
    with engine.open(**kwargs) as other:
        list(other.stream(2, decode=False))
        one.resume()
        engine.step()
        assert one.current.branches[0].cache.offloaded is not None and pool.used == 6  # no room for both: it waits
        assert torch.equal(torch.cat([block.latents for block in other.stream(1, decode=False)]), single[6:9])
        engine.manager.check_integrity()
    made += [block.latents for block in one.stream(1, decode=False)]
    assert one.current.branches[0].cache.offloaded is None
    one.pause()
    engine.step()
    one.rewind(3)  # to before the last block, while both are away
    one.resume()
    made[3:] = [block.latents for block in one.stream(3, decode=False)]
    assert torch.equal(torch.cat(made), single)
    one.pause()
    engine.step()
    engine.manager.check_integrity()
    one.close()
    assert pool.used == 0 and engine.kv_manager.store(SIZE).users == 0
    with pytest.raises(UsageError, match="kv_offload is 1"):
        make_engine(kv_offload=1)


def raw(tensor):
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("given", [None, "int8"])
@torch.no_grad()
def test_exported_pages_continue_in_another_engine(given):
    overrides = {"kv_dtype": given, "sink_decay": 0.9, "positions": "window-relative"}
    first, second = (make_engine("longlive", "float32", **overrides) for _ in range(2))
    with first.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(5, decode=False))
        exported = session.current.branches[0].cache.export_pages()
        with second.open(prompt_embeds=ROWS.float(), size=SIZE) as other:
            other.current.timeline = copy.deepcopy(session.current.timeline)
            other.current.recent = session.current.recent
            other.current.branches[0].cache.import_pages(exported)
            went_on = [block.latents for block in other.stream(2, decode=False)]
        assert torch.equal(torch.cat(went_on), torch.cat([b.latents for b in session.stream(2, decode=False)]))
        with pytest.raises(ValueError, match="expected torch"):
            session.current.branches[0].cache.import_pages(dataclasses.replace(exported, kv=exported.kv.double()))


class AveragedSink(ContiguousCache):
    """Keys as they come; a frame that leaves is averaged into the sink frame of its phase. Nothing is rotated."""

    decay, sinks = 0.8, 3

    def set_window(self, frames):
        for frame in [frame for frame in self.frames if frame not in frames] if frames else []:
            at, gone = (self.frames[(frame - self.frames[0]) % self.sinks], frame)
            for tensor in (*self.keys, *self.values):
                by_frame = tensor.unflatten(1, (-1, self.tokens))
                sink = by_frame[:, self.frames.index(at)]
                sink.copy_(self.decay * sink + (1 - self.decay) * by_frame[:, self.frames.index(gone)])
        super().set_window(frames)


@pytest.mark.parametrize("positions", ["absolute", "window-relative"])
@torch.no_grad()
def test_a_moving_average_sink(positions):
    """Averages of stored, rotated keys equal averages of plain ones; a fork's sink goes its own way."""
    overrides = {"positions": positions, "sink_decay": AveragedSink.decay, "prompt_switch": "cut"}
    expected = stream(contiguous(make_engine("longlive", **overrides), True, AveragedSink), 8)
    assert (stream(make_engine("longlive", **overrides), 8) - expected).abs().max() <= 1e-10
    assert (stream(make_engine("longlive", **overrides | {"sink_decay": 1.0}), 8) - expected).abs().max() > 1e-4
    engine = make_engine("longlive", **overrides)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(6, decode=False))
        cache = session.current.branches[0].cache
        with session.fork() as other:
            sink, there = cache.sink, other.current.branches[0].cache
            list(other.stream(1, decode=False))
            sinks = engine.resources.worker.sinks
            assert cache.sink is sink and not torch.equal(sinks[there.sink.number], sinks[sink.number])
            assert not {there.table.pages[frame] for frame in range(3)} & set(cache.table.pages.values())
            cache.store.pool.check_integrity([cache.table, there.table])


@torch.no_grad()
def test_averages_of_a_moving_sink_go_to_the_host_with_its_pages(monkeypatch):
    """Once for all that share them, and a resting stream goes on bit for bit, or not if they are left out."""
    overrides = {"sink_decay": 0.9, "rewind_blocks": 1, "kv_offload": True}
    expected = stream_of(make_engine("longlive", **overrides), 7)

    def rested(spoil):
        engine = make_engine("longlive", **overrides)
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            made = list(session.stream(5, decode=False))
            here, other = session.caches
            other.sink = here.sink
            sinks, store, copies = engine.resources.worker.sinks, page_tensors(engine), []
            before, to_host = sinks[here.sink.number], store.to_host
            monkeypatch.setattr(store, "to_host", lambda tensor: copies.append(to_host(tensor)) or copies[-1])
            session.pause()
            engine.step()
            assert here.offloaded is not None and here.sink is other.sink and len(copies) == 1
            hosted = sinks[here.sink.number]
            assert hosted is copies[0] and torch.equal(hosted, before) and hosted is not before
            sinks[here.sink.number] = hosted * spoil
            session.resume()
            made += session.stream(2, decode=False)
        return torch.cat([block.latents for block in made])

    assert torch.equal(rested(1), expected) and not torch.equal(rested(1.5), expected)


class Rounded(BoundCache):
    """Keys and values rounded as they are stored, by frame and head."""

    def _store(self, stored, new):
        frames = new.unflatten(1, (-1, TOKENS))
        limit = {"fp8": 448, "int8": 127}.get(self.cache.kv_dtype)
        if limit is None:
            rounded = frames.to(getattr(torch, self.cache.kv_dtype)).to(frames)
        else:
            scale = frames.abs().amax((2, 4), keepdim=True) / limit
            small = frames / scale
            small = small.to(torch.float8_e4m3fn).to(frames) if limit == 448 else (small + 0.5).floor()
            rounded = small * scale.float().to(frames)
        return super()._store(stored, rounded.flatten(1, 2))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "fp8", "int8"])
@torch.no_grad()
def test_pages_in_fewer_bits_equal_rounded_keys_and_values(kv_dtype):
    class RoundedCache(ContiguousCache):
        def bind(self, run):
            return Rounded(self, run)

    RoundedCache.kv_dtype = kv_dtype
    expected = stream(contiguous(make_engine("longlive"), kind=RoundedCache), 7)
    actual = stream(make_engine("longlive", kv_dtype=kv_dtype), 7)
    assert (actual - expected).abs().max() <= 1e-6
    assert (actual - stream(make_engine("longlive"), 7)).abs().max() > 1e-4


BOUNDS = {"bfloat16": 7e-4, "float16": 1e-4, "fp8": 1.5e-2, "int8": 3.5e-3}


@pytest.mark.parametrize("kv_dtype", BOUNDS)
@torch.no_grad()
def test_what_fewer_bits_cost(kv_dtype):
    """Relative error of one velocity over a given past of twelve frames, random weights, within stated bounds."""
    past = torch.randn(12, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    x = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(4))

    def velocity(dtype):
        engine = make_engine("longlive-infinity", "float32", kv_dtype=dtype)
        with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
            engine.loop.cache_prefix(session.current, past)
            run = session.current.timeline.joint_pass([(session.current.timeline.admit().frames, 500.0)], frozenset())
            engine.loop.roll_caches(session.current, run)
            return engine.loop.velocity(session.current, run, x)

    plain = velocity(None)
    error = float((velocity(kv_dtype) - plain).norm() / plain.norm())
    assert BOUNDS[kv_dtype] / 10 < error < BOUNDS[kv_dtype], error


def test_memory_is_counted_before_it_is_taken():
    engine = make_engine("longlive", "float32")
    page = engine.kv_manager.form(SIZE).nbytes
    assert page == 2 * 2 * 4 * 64 * 4  # keys and values, layers, tokens, width, bytes
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        assert session.current.branches[0].cache.store.nbytes == 12 * page
    small = make_engine("longlive", "float32", kv_memory=12 * page - 1)
    with pytest.raises(UsageError, match=f"{format_bytes(12 * page - 1)}.*longlive"):
        small.open(prompt_embeds=ROWS.float(), size=SIZE)
    fewer = make_engine("longlive", "float32", kv_memory=12 * page - 1, kv_dtype="int8")
    fewer.open(prompt_embeds=ROWS.float(), size=SIZE)
    assert fewer.kv_manager.form(SIZE).nbytes == page // 4 + 2 * 2 * 2 * 4
    store = fewer.kv_manager.store(SIZE)
    assert store.nbytes <= 12 * page - 1 < store.nbytes + store.form.nbytes


def test_a_fixed_budget_is_not_passed():
    """A second session is not let in; one that finds no page all the same goes on once there is one."""
    engine = make_engine("self-forcing", "float32", local_attn_size=6, kv_memory=7 * 4096)
    one = engine.open(prompt_embeds=ROWS.float(), size=SIZE)
    with pytest.raises(InferixError, match=r"24.58 kB.*24.58 kB of 28.67 kB"):
        engine.open(prompt_embeds=ROWS.float(), size=SIZE)
    made = list(one.stream(1, decode=False))
    pool = engine.kv_manager.store(SIZE).pool
    assert (pool.size, pool.used) == (7, 3)
    engine.check_integrity()
    taken = pool.acquire(3)
    with pytest.raises(OutOfPages, match=r"3 pages.*1 of 7"):
        next(one.stream(1, decode=False))
    assert pool.used == 3 + 3
    pool.release(taken)
    made += one.stream(2, decode=False)
    expected = stream_of(make_engine("self-forcing", "float32", local_attn_size=6), 3)
    assert torch.equal(torch.cat([block.latents for block in made]), expected)
    one.current.branches[0].cache.offload()  # its pages are free until `onload`
    with pytest.raises(UsageError, match="kv_memory"):
        engine.open(prompt_embeds=ROWS.float(), size=(32, 64))
    assert list(engine.kv_manager.stores) == [((2, 2), 0)]
    one.close()
    with pytest.raises(UsageError, match=r"kv_memory is 28.67 kB.*49.15 kB: 6"):
        engine.open(prompt_embeds=ROWS.float(), size=(32, 64))
    assert not engine.kv_manager.stores


def test_without_a_budget_there_is_room_for_more(monkeypatch):
    """A window without an end, and a second session, make the store grow; what is held moves with it, or nothing."""
    engine = make_engine("self-forcing", local_attn_size=-1)
    assert page_needs(engine.preset).total is None
    actual = stream_of(engine, 4)
    assert engine.kv_manager.store(SIZE).pool.size == 12
    assert (actual - stream_of(contiguous(make_engine("self-forcing", local_attn_size=-1)), 4)).abs().max() <= 1e-10
    engine = make_engine("self-forcing", local_attn_size=6)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as one, engine.open(prompt_embeds=ROWS, size=SIZE, seed=1) as other:
        made = [torch.cat([next(s.stream(1, decode=False)).latents for _ in range(3)]) for s in (one, other)]
        store = engine.kv_manager.store(SIZE)
        assert store.pool.size == 12
        with monkeypatch.context() as patch:
            patch.setattr(page_tensors(engine), "_allocate", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                store.make_room(1)
            assert store.pool.size == page_tensors(engine).kv[0].shape[1] == 12
    for seed, latents in enumerate(made):
        assert torch.equal(latents, stream_of(make_engine("self-forcing", local_attn_size=6), 3, seed=seed))


def stream_of(engine, blocks, **kwargs):
    with engine.open(prompt_embeds=ROWS.to(engine.dtype), size=SIZE, **kwargs) as session:
        return torch.cat([block.latents for block in session.stream(blocks, decode=False)])


@pytest.mark.parametrize(
    ("name", "overrides", "context", "scratch", "reserve"),
    [
        ("self-forcing", {}, 21, 0, 0),
        ("longlive", {"rewind_blocks": 2}, 12, 0, 6 + 12),
        ("causvid", {"rewind_blocks": 1}, 21, 0, 3 + 3),
        ("krea", {"rewind_blocks": 2}, 6, 0, 12),
        ("rolling-forcing", {}, 24, 15, 0),
        ("self-forcing", {"local_attn_size": -1}, None, 0, 0),
    ],
)
def test_page_needs(name, overrides, context, scratch, reserve):
    needs = page_needs(make_engine(name, "float32", **overrides).preset)
    assert (needs.context, needs.scratch, needs.reserve) == (context, scratch, reserve)


def test_words_for_bytes_and_back():
    assert [parse_bytes(text) for text in (4096, "6GB", "1.5 GiB", "512 kib")] == [4096, 6 * 10**9, 3 * 2**29, 2**19]
    assert [format_bytes(count) for count in (6 * 10**9, 28672, 12)] == ["6 GB", "28.67 kB", "12 bytes"]
    for bad in ("six", "6 TBx", "-1", 0, "1.2.3GB", ".", True):
        with pytest.raises(UsageError, match="memory is"):
            parse_bytes(bad)
    with pytest.raises(UsageError, match="kv_dtype is 'fp4'"):
        make_engine(kv_dtype="fp4")


def test_fp8_asks_for_a_gpu_that_has_it(monkeypatch):
    config = make_engine("longlive", "float32").config
    monkeypatch.setattr("inferix.runtime.config.check_device", lambda name: None)
    for capability, named in (((8, 0), "8.0.*8.9"), ((8, 9), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, actual=capability: actual)
        if named is None:
            dataclasses.replace(config, kv_dtype="fp8", device="cuda")
        else:
            with pytest.raises(UsageError, match=named):
                dataclasses.replace(config, kv_dtype="fp8", device="cuda")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sink_decay": 0.0}, "sink_decay is 0.0"),
        ({"sink_decay": 0.9, "sink_size": 0}, "sink_decay.*sink_size"),
        ({"positions": "window-relative", "shot_offset": 8}, "window-relative.*shot_offset"),
        ({"rewind_blocks": -1}, "rewind_blocks is -1"),
        ({"rest_sink": -1}, "rest_sink is -1"),
    ],
)
def test_policies_that_pages_cannot_follow(changes, named):
    with pytest.raises(UsageError, match=named):
        ContextPolicy(**{"local_attn_size": 12, "sink_size": 3, "positions": "absolute"} | changes)
