#include "pass.hpp"

#include <algorithm>
#include <numeric>
#include <set>

namespace inferix {

bool contains(const Frames& frames, int64_t frame) { return std::ranges::find(frames, frame) != frames.end(); }

Frames range(int64_t begin, int64_t end) {
    Frames made(std::max<int64_t>(end - begin, 0));
    std::iota(made.begin(), made.end(), begin);
    return made;
}

int64_t Group::position_of(int64_t frame) const {
    return positions[std::ranges::find(context, frame) - context.begin()];
}

Frames Pass::frames() const {
    Frames made;
    for (const Group& group : groups) made.insert(made.end(), group.frames.begin(), group.frames.end());
    return made;
}

std::vector<double> Pass::timesteps() const {
    std::vector<double> made;
    for (const Group& group : groups) made.insert(made.end(), group.frames.size(), group.timestep);
    return made;
}

Frames Pass::written(bool write) const {
    Frames made;
    for (const Group& group : groups)
        if (group.write == write) made.insert(made.end(), group.frames.begin(), group.frames.end());
    return made;
}

Pass Pass::without_past() const {
    Pass made = *this;
    for (Group& group : made.groups) {
        group.context = group.frames;
        std::ranges::sort(group.context);
        group.positions = range(0, int64_t(group.frames.size()));
        group.write = false;
    }
    return made;
}

Pass Pass::read_only() const {
    Pass made = *this;
    for (Group& group : made.groups) group.write = false;
    return made;
}

std::optional<Frames> ScheduledPass::window() const {
    if (run.written().empty()) return std::nullopt;
    std::set<int64_t> held(beside.begin(), beside.end());
    for (const Group& group : run.groups) held.insert(group.context.begin(), group.context.end());
    for (int64_t frame : run.written(false)) held.erase(frame);
    return Frames(held.begin(), held.end());
}

}  // namespace inferix
