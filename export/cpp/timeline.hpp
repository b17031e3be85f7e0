// One stream's place in time: which frames come next, what they see, and at which positions. Integers only.
// The same rules as schemes/timeline.py, schemes/block_schedule.py and schemes/fixed_window.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "json.hpp"
#include "pass.hpp"

namespace inferix {

// The settings of a preset that a stream follows.
struct Policy {
    int64_t block, window_blocks, steps, window, sink_size, rest_sink, shot_offset, blend_blocks, clean_range;
    bool single_first, relative, contiguous, moving, commit_sees_sink, recaches, recache_sink, blends, joins;
    bool commit_in_next, clean_null;
    double context_timestep;
    float noise_scale;                // of noise that a frame starts from, but at rest
    std::vector<int64_t> ranges;      // blocks that a block sees, in equal shares of its steps; empty for the window
    std::vector<double> conditions;   // of each step; empty for networks that take none

    // plan: of an engine.
    explicit Policy(const Json& plan);
    int64_t block_size(int64_t frame) const { return frame == 0 && single_first ? 1 : block; }
    // Blocks that hold so many latent frames.
    int64_t blocks_for(int64_t frames) const;
    bool has_ranges() const { return !ranges.empty() || clean_range > 0; }
    // Slots of the past: the window, and what a pass keeps beside it.
    int64_t slots() const;
    std::optional<double> condition(int64_t step) const;
};

struct Block {
    int64_t index = 0;
    Frames frames;
};

// A block being denoised; step: sampler steps that it has taken.
struct Progress {
    Block block;
    int64_t step = 0;
};

class Timeline {
   public:
    explicit Timeline(const Policy& policy);

    Block admit();
    void cut_shot();
    // Hold frames of a rest as the sink, or give them back to the window. arrival: the frame whose place the block before
    // the newest still shows; none if that block moved.
    void follow_rest(std::optional<int64_t> arrival);
    // True where a new block joins before the next denoising pass. flight: blocks in flight.
    bool joins(const std::vector<Progress>& flight) const;
    // One step of all blocks in flight, after the commit of the uncommitted block, which is none from then on.
    // timesteps: of each step. seen: frames that a commit in an earlier pass of the same block saw.
    ScheduledPass denoise_pass(const std::vector<Progress>& flight, const std::vector<double>& timesteps, Frames& seen);
    // The pass over a clean block that leaves its keys and values.
    ScheduledPass commit_pass(const Frames& frames) const;
    // The visible past under a new prompt; none where there is none to recompute.
    std::optional<ScheduledPass> recache_pass();
    void forget(const Frames& held);

    Policy policy;
    int64_t next_block = 0, next_frame = 0, shot = 0;
    bool pin_next = false;
    Frames sink, pinned;
    std::map<int64_t, int64_t> places;  // position of each frame that may still be seen
    std::optional<Block> uncommitted;   // the last finished block, where the next one's first pass commits it

   private:
    Frames visible(int64_t end) const;
    Frames key_range(int64_t blocks, int64_t end, const Frames& context) const;
    Frames positions(const Frames& context, bool write) const;
    Group clean_group(const Frames& frames, Frames context) const;
    Group commit_group(const Frames& frames) const;
    Frames beside(const Pass& run) const;
    bool in_sink(int64_t frame) const;
};

// The frame in each filled slot of a past. The filled slots are always the first ones.
class FixedWindow {
   public:
    struct Update {
        std::vector<std::pair<int64_t, int64_t>> writes, moves;  // (frame, slot) first, then (from, to)
    };

    // Make `past` the frames of the slots: evict all others, and place those of `fresh` that are in it.
    Update update(const Frames& past, const Frames& fresh);

    Frames frames;
};

}  // namespace inferix
