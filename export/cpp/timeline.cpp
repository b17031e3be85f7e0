#include "timeline.hpp"

#include <algorithm>
#include <set>

#include "error.hpp"

namespace inferix {

Policy::Policy(const Json& plan) {
    const Json &preset = plan.at("preset"), &context = preset.at("context"), &sampler = plan.at("sampler");
    block = preset.at("num_frame_per_block").integer();
    single_first = preset.at("independent_first_frame").truth();
    window_blocks = preset.at("window_blocks").integer();
    steps = int64_t(sampler.at("timesteps").items().size());
    window = context.at("local_attn_size").integer();
    sink_size = context.at("sink_size").integer();
    bool rests = plan.at("version").integer() >= 4;
    rest_sink = rests ? context.at("rest_sink").integer() : 0;
    noise_scale = rests ? float(preset.at("sampler").at("noise_scale").real()) : 1;
    shot_offset = context.at("shot_offset").integer();
    blend_blocks = context.at("blend_blocks").integer();
    relative = context.at("positions").string() == "window-relative";
    contiguous = context.at("positions").string() == "contiguous";
    moving = context.at("positions").string() != "absolute";
    commit_sees_sink = context.at("commit_sees_sink").truth();
    recaches = context.at("prompt_switch").string() == "recache";
    blends = context.at("prompt_switch").string() == "blend";
    joins = context.at("prompt_switch").string() == "join";
    recache_sink = context.at("recache_sink").truth();
    commit_in_next = context.at("commit_in_next").truth();
    clean_null = context.at("clean_text").string() == "null";
    clean_range = context.at("clean_chunk_kvrange").integer();
    ranges = context.at("noise2clean_kvrange").integers();
    context_timestep = sampler.at("context_timestep").real();
    if (sampler.has("rules") && sampler.at("rules").has("conditions"))
        conditions = sampler.at("rules").at("conditions").reals();
    bool supported = window > 0 && context.at("commit").truth() && context.at("segment_frames").integer() == 0 &&
                     context.at("sink_decay").real() == 1;
    if (!supported)
        throw UsageError("preset " + preset.at("name").string() +
                         " needs what this runner does not do; use inferix-run, or export another preset");
}

int64_t Policy::blocks_for(int64_t frames) const {
    int64_t blocks = 0;
    for (int64_t made = 0; made < frames; made += block_size(made)) ++blocks;
    return blocks;
}

int64_t Policy::slots() const {
    // A block that is denoised alone is seen while the block before still sees its own window.
    int64_t both = commit_in_next && window_blocks == 1 ? block : 0;
    return window + (commit_sees_sink ? 0 : sink_size) + both;
}

std::optional<double> Policy::condition(int64_t step) const {
    if (conditions.empty()) return std::nullopt;
    return conditions[step];
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

void Timeline::follow_rest(std::optional<int64_t> arrival) {
    auto count = int64_t(sink.size());
    int64_t first = next_frame - policy.window;  // that the newest block would see without a sink
    if (policy.rest_sink > 0 && arrival) {
        if (count == policy.rest_sink && *arrival <= sink.front()) return;
        if (*arrival <= first) {
            sink = range(first, first + policy.rest_sink);
            return;
        }
    }
    sink.resize(size_t(std::max(policy.sink_size, count - policy.block)));
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

// Frames of a context that the last of `blocks` blocks sees, which ends before `end`; sink and pinned frames stay.
Frames Timeline::key_range(int64_t blocks, int64_t end, const Frames& context) const {
    int64_t start = end - blocks * policy.block;
    Frames seen;
    for (int64_t frame : context)
        if (frame < end && (frame >= start || in_sink(frame) || contains(pinned, frame))) seen.push_back(frame);
    return seen;
}

Frames Timeline::positions(const Frames& context, bool write) const {
    if (policy.relative) return range(0, int64_t(context.size()));
    if (policy.contiguous && !write) {
        int64_t end = places.at(context.back()) + 1;
        return range(end - int64_t(context.size()), end);
    }
    Frames made;
    for (int64_t frame : context) made.push_back(places.at(frame));
    return made;
}

Group Timeline::clean_group(const Frames& frames, Frames context) const {
    Frames at = positions(context, true);
    return {frames, policy.context_timestep, std::move(context), std::move(at), true, false, policy.clean_null};
}

Group Timeline::commit_group(const Frames& frames) const {
    int64_t end = frames.back() + 1;
    if (policy.clean_range > 0) return clean_group(frames, key_range(policy.clean_range, end, visible(next_frame)));
    if (policy.commit_sees_sink) return clean_group(frames, visible(end));
    return clean_group(frames, range(std::max<int64_t>(0, end - policy.window), end));
}

bool Timeline::joins(const std::vector<Progress>& flight) const {
    int64_t between = policy.steps / policy.window_blocks;
    return flight.empty() || (int64_t(flight.size()) < policy.window_blocks && flight.back().step >= between);
}

ScheduledPass Timeline::denoise_pass(
    const std::vector<Progress>& flight, const std::vector<double>& timesteps, Frames& seen) {
    int64_t steps = int64_t(timesteps.size()), shares = int64_t(policy.ranges.size());
    Frames all = visible(flight.back().block.frames.back() + 1);
    bool write = policy.window_blocks == 1;
    ScheduledPass made;
    if (uncommitted) made.run.groups.push_back(commit_group(uncommitted->frames));
    for (const Progress& one : flight) {
        const Frames& frames = one.block.frames;
        Frames context = all;
        if (shares > 0) context = key_range(policy.ranges[one.step * shares / steps], frames.back() + 1, all);
        Frames at = positions(context, write);
        made.run.groups.push_back({frames, timesteps[one.step], std::move(context), std::move(at), write});
    }
    made.run.condition = policy.condition(flight.back().step);
    made.commits = uncommitted.has_value();
    uncommitted.reset();
    if (policy.has_ranges()) made.beside = beside(made.run);
    if (made.commits) {
        seen = made.window().value_or(Frames());
    } else if (!made.run.written().empty()) {
        std::set<int64_t> kept(made.beside.begin(), made.beside.end());
        kept.insert(seen.begin(), seen.end());
        made.beside.assign(kept.begin(), kept.end());
    }
    return made;
}

ScheduledPass Timeline::commit_pass(const Frames& frames) const {
    Pass run{{commit_group(frames)}, policy.condition(0)};
    Frames kept = beside(run);
    return {std::move(run), std::move(kept)};
}

// Frames that the cache keeps although a pass that writes does not see them: those of the sink before all that it sees;
// with key ranges, all clean frames in the window of the newest block.
Frames Timeline::beside(const Pass& run) const {
    Frames kept;
    if (policy.has_ranges()) {
        int64_t end = 0;
        for (int64_t frame : run.written()) end = std::max(end, frame + 1);
        for (int64_t frame : visible(next_frame))
            if (frame < end) kept.push_back(frame);
        return kept;
    }
    int64_t first = next_frame;
    for (const Group& group : run.groups) first = std::min(first, group.context.front());
    for (int64_t frame : sink)
        if (frame < first) kept.push_back(frame);
    return kept;
}

std::optional<ScheduledPass> Timeline::recache_pass() {
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
    return ScheduledPass{Pass{{clean_group(frames, std::move(context))}, policy.condition(0)}, {}};
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
