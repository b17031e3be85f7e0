#include "past.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

namespace inferix {
namespace {

template <class Map, class Kept>
void keep_known(Map& map, const Kept& kept) {
    std::erase_if(map, [&](const auto& entry) { return !contains(kept, entry.first); });
}

}  // namespace

Past::Past(const Plan& plan, int64_t frames) : frequencies_(plan.at("rope").at("frequencies").reals()), half_(0) {
    const Json &model = plan.at("model"), &rope = plan.at("rope");
    const std::vector<int64_t> pairs = rope.at("pairs").integers();
    if (rope.has("half_split") && rope.at("half_split").truth())
        half_ = std::accumulate(pairs.begin(), pairs.end(), int64_t{0});
    Shape shape{frames, plan.at("size").at("tokens").integer(), model.at("heads").integer(),
                model.at("channels").integer()};
    for (int64_t layer = 0; layer < model.at("layers").integer(); ++layer)
        for (const char* part : {"past_k_", "past_v_"}) values_[part + std::to_string(layer)] = Tensor(shape);
}

void Past::keep(const Frames& frames, const Frames& positions, Results fresh) {
    pending_ = frames;
    fresh_ = std::move(fresh);
    for (size_t index = 0; index < frames.size(); ++index) {
        stored_[frames[index]] = positions[index];
        shifts_[frames[index]] = 0;
        originals_.erase(frames[index]);
    }
}

void Past::roll(const std::optional<Frames>& cached) {
    Frames held;
    if (cached) {
        held = *cached;
    } else {
        std::set<int64_t> all(slots_.frames.begin(), slots_.frames.end());
        all.insert(pending_.begin(), pending_.end());
        held.assign(all.begin(), all.end());
    }
    FixedWindow::Update update = slots_.update(held, pending_);
    for (auto& [name, tensor] : values_) {
        int64_t stride = tensor.stride();
        auto at = [&](int64_t slot) { return tensor.data.begin() + slot * stride; };
        for (auto [frame, slot] : update.writes) {
            int64_t index = std::ranges::find(pending_, frame) - pending_.begin();
            std::copy_n(fresh_.at("new_" + name.substr(5)).data.begin() + index * stride, stride, at(slot));
        }
        for (auto [from, to] : update.moves) std::copy_n(at(from), stride, at(to));
    }
    pending_.clear();
    fresh_.clear();
    keep_known(stored_, held);
    keep_known(shifts_, held);
    keep_known(originals_, held);
}

Frames Past::bind(const std::map<int64_t, int64_t>& past, Values& values, Results& made) {
    Frames seen, places;
    for (size_t slot = 0; slot < slots_.frames.size(); ++slot) {
        auto found = past.find(slots_.frames[slot]);
        if (found == past.end()) continue;
        auto [frame, position] = *found;
        seen.push_back(frame);
        places.push_back(int64_t(slot));
        int64_t shift = position - stored_.at(frame);
        if (shift != shifts_.at(frame)) rotate(int64_t(slot), frame, shift);
    }
    bool all = seen.size() == slots_.frames.size();
    for (const auto& [name, tensor] : values_) {
        Shape shape = tensor.shape;
        shape[0] = int64_t(seen.size());
        if (all) {
            values[name] = View(tensor.data.data(), shape);
            continue;
        }
        Tensor& some = made[name] = Tensor(shape);
        auto to = some.data.begin();
        for (int64_t slot : places) to = std::copy_n(tensor.data.begin() + slot * tensor.stride(), tensor.stride(), to);
        values[name] = some;
    }
    return seen;
}

void Past::rotate(int64_t slot, int64_t frame, int64_t shift) {
    bool known = originals_.contains(frame);
    Results& original = originals_[frame];
    for (auto& [name, tensor] : values_) {
        if (!name.starts_with("past_k")) continue;
        int64_t stride = tensor.stride(), channels = tensor.shape.back();
        float* keys = tensor.data.data() + slot * stride;
        if (!known) original[name] = Tensor({stride}, std::vector<float>(keys, keys + stride));
        const float* source = original[name].data.data();
        for (int64_t head = 0; head < stride; head += channels)
            for (size_t pair = 0; pair < frequencies_.size(); ++pair) {
                size_t one = head + (half_ > 0 ? pair : 2 * pair), two = half_ > 0 ? one + half_ : one + 1;
                double even = source[one], odd = source[two], angle = double(shift) * frequencies_[pair];
                double cos = std::cos(angle), sin = std::sin(angle);
                keys[one] = float(even * cos - odd * sin);
                keys[two] = float(even * sin + odd * cos);
            }
    }
    shifts_[frame] = shift;
}

}  // namespace inferix
