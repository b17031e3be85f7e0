// One stream's place in time: which frames come next, what they see, and at which positions. Integers only.
// The same rules as schemes/timeline.py and schemes/fixed_window.py, for one block in flight.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "json.hpp"

namespace inferix {

using Frames = std::vector<int64_t>;

// The settings of a preset that a stream follows.
struct Policy {
    int64_t block, window, sink_size, shot_offset, blend_blocks;
    bool single_first, relative, moving, commit_sees_sink, recaches, recache_sink, blends;

    explicit Policy(const Json& preset);
    int64_t block_size(int64_t frame) const { return frame == 0 && single_first ? 1 : block; }
    // Blocks that hold so many latent frames.
    int64_t blocks_for(int64_t frames) const;
};

// A pass: its frames, the frames they see, ascending, and the rotary position of each of those.
struct Pass {
    Frames frames, context, positions;

    int64_t position_of(int64_t frame) const;
};

struct Block {
    int64_t index;
    Frames frames;
};

class Timeline {
   public:
    explicit Timeline(const Policy& policy);

    Block admit();
    void cut_shot();
    Pass denoise_pass(const Frames& frames) const;
    Pass commit_pass(const Frames& frames) const;
    // The visible past under a new prompt; none where there is none to recompute.
    std::optional<Pass> recache_pass();
    void forget(const Frames& held);

    Policy policy;
    int64_t next_block = 0, next_frame = 0, shot = 0;
    bool pin_next = false;
    Frames sink, pinned;
    std::map<int64_t, int64_t> places;  // position of each frame that may still be seen

   private:
    Frames visible(int64_t end) const;
    Pass pass(Frames frames, Frames context) const;
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
