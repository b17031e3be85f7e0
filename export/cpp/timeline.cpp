#include "timeline.hpp"

#include <algorithm>
#include <numeric>
#include <set>

#include "error.hpp"

namespace inferix {
namespace {

bool contains(const Frames& frames, int64_t frame) { return std::ranges::find(frames, frame) != frames.end(); }

Frames range(int64_t begin, int64_t end) {
    Frames made(std::max<int64_t>(end - begin, 0));
    std::iota(made.begin(), made.end(), begin);
    return made;
}

}  // namespace

Policy::Policy(const Json& preset) {
    const Json& context = preset.at("context");
    block = preset.at("num_frame_per_block").integer();
    single_first = preset.at("independent_first_frame").truth();
    window = context.at("local_attn_size").integer();
    sink_size = context.at("sink_size").integer();
    shot_offset = context.at("shot_offset").integer();
    blend_blocks = context.at("blend_blocks").integer();
    relative = context.at("positions").string() == "window-relative";
    moving = context.at("positions").string() != "absolute";
    commit_sees_sink = context.at("commit_sees_sink").truth();
    recaches = context.at("prompt_switch").string() == "recache";
    blends = context.at("prompt_switch").string() == "blend";
    recache_sink = context.at("recache_sink").truth();
    const std::string name = preset.at("name").string();
    if (preset.at("window_blocks").integer() != 1)
        throw UsageError("preset " + name + " has several blocks in flight (window_blocks " +
                         std::to_string(preset.at("window_blocks").integer()) +
                         "), which this runner does not do; use inferix-run, or export another preset");
    bool supported = window > 0 && context.at("commit").truth() && context.at("segment_frames").integer() == 0 &&
                     context.at("sink_decay").real() == 1;
    if (!supported)
        throw UsageError("preset " + name +
                         " needs what this runner does not do; use inferix-run, or export another preset");
}

int64_t Policy::blocks_for(int64_t frames) const {
    int64_t blocks = 0;
    for (int64_t made = 0; made < frames; made += block_size(made)) ++blocks;
    return blocks;
}

int64_t Pass::position_of(int64_t frame) const {
    return positions[std::ranges::find(context, frame) - context.begin()];
}

Timeline::Timeline(const Policy& rules) : policy(rules), sink(range(0, rules.sink_size)) {}

bool Timeline::in_sink(int64_t frame) const { return contains(sink, frame); }

Block Timeline::admit() {
    Block block{next_block++, range(next_frame, next_frame + policy.block_size(next_frame))};
    for (int64_t frame : block.frames) places[frame] = frame + shot * policy.shot_offset;
    if (pin_next) {
        pinned = block.frames;
        pin_next = false;
    }
    next_frame = block.frames.back() + 1;
    return block;
}

void Timeline::cut_shot() {
    if (policy.shot_offset == 0) return;
    ++shot;
    pin_next = true;
}

Frames Timeline::visible(int64_t end) const {
    if (end <= policy.window) return range(0, end);
    std::set<int64_t> kept(sink.begin(), sink.end());
    int64_t start = end - (policy.window - int64_t(sink.size()));
    if (std::ranges::any_of(pinned, [&](int64_t frame) { return frame < start; })) {
        kept.insert(pinned.begin(), pinned.end());
        start = end - (policy.window - int64_t(kept.size()));
    }
    for (int64_t frame : range(start, end)) kept.insert(frame);
    return {kept.begin(), kept.end()};
}

Pass Timeline::pass(Frames frames, Frames context) const {
    Frames positions = range(0, int64_t(context.size()));
    if (!policy.relative) std::ranges::transform(context, positions.begin(), [&](int64_t f) { return places.at(f); });
    return {std::move(frames), std::move(context), std::move(positions)};
}

Pass Timeline::denoise_pass(const Frames& frames) const { return pass(frames, visible(frames.back() + 1)); }

Pass Timeline::commit_pass(const Frames& frames) const {
    int64_t end = frames.back() + 1;
    return pass(frames, policy.commit_sees_sink ? visible(end) : range(std::max<int64_t>(0, end - policy.window), end));
}

std::optional<Pass> Timeline::recache_pass() {
    int64_t end = next_frame, first = std::max<int64_t>(0, end - policy.window);
    if (!policy.recaches || end == 0) return std::nullopt;
    Frames context = visible(end);
    if (policy.recache_sink && !sink.empty()) {
        sink = range(first, first + int64_t(sink.size()));
        context = range(first, end);
    }
    Frames frames;
    for (int64_t frame : context)
        if (policy.recache_sink || first == 0 || !in_sink(frame)) frames.push_back(frame);
    if (frames.empty()) return std::nullopt;
    return pass(std::move(frames), std::move(context));
}

void Timeline::forget(const Frames& held) {
    int64_t oldest = held.back() + 1 - policy.window;
    std::erase_if(places, [&](const auto& entry) {
        int64_t frame = entry.first;
        return frame < oldest && !contains(held, frame) && !in_sink(frame) && !contains(pinned, frame);
    });
}

FixedWindow::Update FixedWindow::update(const Frames& past, const Frames& fresh) {
    Update update;
    Frames holes;
    for (size_t slot = 0; slot < frames.size(); ++slot)
        if (!contains(past, frames[slot]) || contains(fresh, frames[slot])) holes.push_back(int64_t(slot));
    for (int64_t frame : fresh) {
        if (!contains(past, frame)) continue;
        int64_t slot = int64_t(frames.size());
        if (holes.empty()) {
            frames.push_back(frame);
        } else {
            slot = holes.front();
            holes.erase(holes.begin());
            frames[slot] = frame;
        }
        update.writes.emplace_back(frame, slot);
    }
    while (!holes.empty()) {
        if (holes.back() == int64_t(frames.size()) - 1) {
            holes.pop_back();
        } else {
            update.moves.emplace_back(int64_t(frames.size()) - 1, holes.front());
            frames[holes.front()] = frames.back();
            holes.erase(holes.begin());
        }
        frames.pop_back();
    }
    return update;
}

}  // namespace inferix
