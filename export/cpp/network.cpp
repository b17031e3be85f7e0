#include "network.hpp"

#include <algorithm>
#include <cmath>
#include <ranges>

#include "stream.hpp"

namespace inferix {
namespace {

// Rows of the first axis, by their numbers.
Tensor chosen(const Tensor& tensor, const std::vector<int64_t>& rows) {
    Shape shape = tensor.shape;
    shape[0] = int64_t(rows.size());
    Tensor made(shape);
    auto to = made.data.begin();
    for (int64_t row : rows) to = std::copy_n(tensor.data.begin() + row * tensor.stride(), tensor.stride(), to);
    return made;
}

std::vector<int64_t> places(const Frames& frames, const Frames& among) {
    std::vector<int64_t> made;
    for (int64_t frame : frames) made.push_back(std::ranges::find(among, frame) - among.begin());
    return made;
}

// Which of some frames each frame of a pass sees, [F, frames].
Tensor sees(const Pass& run, const Frames& frames) {
    Tensor made;
    for (const Group& group : run.groups)
        for (size_t count = 0; count < group.frames.size(); ++count)
            for (int64_t frame : frames) made.data.push_back(contains(group.context, frame));
    made.shape = {int64_t(run.frames().size()), int64_t(frames.size())};
    made.kind = Kind::truth;
    return made;
}

}  // namespace

Shape shape_after(int64_t first, const Shape& rest) {
    Shape shape{first};
    shape.insert(shape.end(), rest.begin(), rest.end());
    return shape;
}

Tensor joined(const std::vector<const Tensor*>& parts) {
    Tensor made(*parts[0]);
    for (const Tensor* part : parts | std::views::drop(1)) {
        made.data.insert(made.data.end(), part->data.begin(), part->data.end());
        made.shape[0] += part->shape[0];
    }
    return made;
}

Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t end) {
    Shape shape = tensor.shape;
    shape[0] = end - begin;
    auto from = tensor.data.begin() + begin * tensor.stride();
    return Tensor(shape, std::vector<float>(from, from + (end - begin) * tensor.stride()));
}

Network::Network(const Engine& engine)
    : guide(engine.plan.at("preset").at("sampler")),
      engine_(engine),
      moving_(engine.policy.moving),
      grouped_(engine.plan.grouped()),
      nothing_(engine.plan, 0) {
    std::vector<size_t> own(guide.branches.size());
    for (size_t number = 0; number < own.size(); ++number)
        if (guide.writes_past(number)) {
            own[number] = pasts_.size();
            pasts_.emplace_back(engine.plan, engine.policy.slots());
        }
    for (size_t number = 0; number < own.size(); ++number)
        owns_.push_back(guide.branches[number].sees_past ? own[guide.branches[number].reads] : pasts_.size());
}

Past& Network::past_of(size_t number) { return owns_[number] < pasts_.size() ? pasts_[owns_[number]] : nothing_; }

Text Network::condition(const Tensor& rows, bool dropped) const {
    Tensor given = engine_.prompts.inputs(rows, dropped);
    return std::make_shared<Results>(engine_.run("prompt", {{"rows", given}}));
}

void Network::begin(const Tensor& rows, const Tensor& negative) {
    std::map<std::pair<bool, bool>, Text> known;  // by whether it is the negative prompt, and dropped
    auto text = [&](bool is_negative, bool dropped) {
        Text& made = known[{is_negative, dropped}];
        if (!made) made = condition(is_negative ? negative : rows, dropped);
        return made;
    };
    for (const Role& role : guide.branches) texts.push_back(text(role.negative, role.negative));
    if (engine_.policy.clean_null)
        for (const Role& role : guide.branches) nulls.push_back(text(true, role.negative));
}

void Network::follow(const Tensor& rows) {
    Text text = condition(rows);
    for (size_t number = 0; number < texts.size(); ++number)
        if (!guide.branches[number].negative) texts[number] = text;
}

void Network::recompute(const ScheduledPass& scheduled, const Tensor& latents) {
    for (size_t number = 0; number < texts.size(); ++number) {
        if (guide.branches[number].negative || !guide.writes_past(number)) continue;
        roll(scheduled, past_of(number));
        run_branch(number, scheduled.run, latents, {});
    }
}

void Network::roll(const ScheduledPass& scheduled, Past& past) const {
    std::optional<Frames> held = scheduled.window();
    if (held) {
        const Frames own = scheduled.run.frames();
        std::erase_if(*held, [&](int64_t frame) { return contains(own, frame); });
    }
    past.roll(held);
}

void Network::roll(const ScheduledPass& scheduled) {
    for (Past& past : pasts_) roll(scheduled, past);
}

Tensor Network::run(
    const ScheduledPass& scheduled, const Tensor& latents, const std::map<int64_t, const Texts*>& texts_of) {
    roll(scheduled);
    const Frames frames = scheduled.run.frames();
    std::map<size_t, Tensor> velocities;  // 0 for frames that a branch does not run
    for (size_t number = 0; number < texts.size(); ++number) {
        std::optional<Pass> own = guide.branch_run(scheduled.run, number);
        if (!own) continue;
        Tensor& velocity = velocities[number] = Tensor(latents.shape);
        const std::vector<int64_t> rows = places(own->frames(), frames);
        std::optional<Tensor> made = run_branch(number, *own, chosen(latents, rows), texts_of);
        for (size_t index = 0; made && index < rows.size(); ++index)
            std::copy_n(made->data.begin() + int64_t(index) * latents.stride(), latents.stride(),
                        velocity.data.begin() + rows[index] * latents.stride());
    }
    return guided(std::move(velocities), scheduled.run, latents.shape);
}

Tensor Network::run_steps(const ScheduledPass& scheduled, const Tensor& noise) {
    roll(scheduled);
    Results made;
    Values values = inputs(0, scheduled.run, {}, made);
    values["noise"] = noise;
    Tensor clean = std::move(engine_.run("steps", values).at("clean"));
    clean.shape.erase(clean.shape.begin());
    return clean;
}

bool Network::rests(int64_t frame) const {
    bool acts = !engine_.plan.at("model").at("actions").items().empty();
    return acts && std::prev(actions.upper_bound(frame))->second == 0;
}

std::optional<int64_t> Network::resting_since(int64_t frame) const {
    if (frame < 0 || !rests(frame)) return std::nullopt;
    auto run = std::prev(actions.upper_bound(frame));
    while (run != actions.begin() && std::prev(run)->second == 0) --run;
    return std::max<int64_t>(0, run->first - 1);
}

std::optional<Tensor> Network::run_branch(
    size_t number, const Pass& run, const Tensor& latents, const std::map<int64_t, const Texts*>& texts_of) {
    Frames clean;
    for (const Group& group : run.groups)
        if (group.commits()) clean.insert(clean.end(), group.frames.begin(), group.frames.end());
    Results made;
    Values values = inputs(number, run, texts_of, made);
    values["latents"] = View(latents.data.data(), shape_after(1, latents.shape));
    Results results = engine_.run(clean.empty() ? "step" : "commit", values);
    std::optional<Tensor> velocity;
    if (auto found = results.extract("velocity"); !found.empty()) velocity = std::move(found.mapped());
    if (!clean.empty()) {
        const std::vector<int64_t> rows = places(clean, run.frames());
        if (rows.size() != run.frames().size())
            for (auto& [name, tensor] : results) tensor = chosen(tensor, rows);
        std::map<int64_t, int64_t> all = positions(run);
        Frames at;
        for (int64_t frame : clean) at.push_back(all.at(frame));
        past_of(number).keep(clean, at, std::move(results));
    }
    return velocity;
}

// Position of each frame of a pass's contexts. Where positions move with the window, they count on from a group's own
// frames, so that keys can stay as they are.
std::map<int64_t, int64_t> Network::positions(const Pass& run) const {
    std::map<int64_t, int64_t> made;
    for (const Group& group : run.groups) {
        int64_t moved = moving_ ? group.frames[0] - group.position_of(group.frames[0]) : 0;
        for (size_t index = 0; index < group.context.size(); ++index)
            made[group.context[index]] = group.positions[index] + moved;
    }
    return made;
}

Values Network::inputs(
    size_t number, const Pass& run, const std::map<int64_t, const Texts*>& texts_of, Results& made) {
    const Frames frames = run.frames();
    const std::vector<double> timesteps = run.timesteps();
    const std::vector<double> frequencies = engine_.plan.at("rope").at("frequencies").reals();
    std::map<int64_t, int64_t> all = positions(run), past = all;
    for (int64_t frame : frames) past.erase(frame);
    Values values;
    const Frames seen = past_of(number).bind(past, values, made);
    int64_t count = int64_t(frames.size()), pairs = int64_t(frequencies.size());
    Tensor cos({count, pairs}), sin({count, pairs}), levels({1, count});
    for (int64_t index = 0; index < count; ++index) {
        for (int64_t pair = 0; pair < pairs; ++pair) {
            double angle = double(all.at(frames[index])) * frequencies[pair];
            cos.data[index * pairs + pair] = float(std::cos(angle));
            sin.data[index * pairs + pair] = float(std::sin(angle));
        }
        levels.data[index] = float(timesteps[index]);
    }
    if (run.condition) {
        levels = Tensor({1, count, 2});
        for (int64_t index = 0; index < count; ++index) {
            levels.data[2 * index] = float(timesteps[index]);
            levels.data[2 * index + 1] = float(*run.condition);
        }
    }
    made["rope_cos"] = std::move(cos);
    made["rope_sin"] = std::move(sin);
    made["timesteps"] = std::move(levels);
    if (auto names = int64_t(engine_.plan.at("model").at("actions").items().size()); names > 0) {
        Tensor hot({1, count, names});
        for (int64_t index = 0; index < count; ++index)
            hot.data[index * names + std::prev(actions.upper_bound(frames[index]))->second] = 1;
        made["actions"] = std::move(hot);
    }
    std::vector<Text> of_frames;
    for (const Group& group : run.groups)
        for (int64_t frame : group.frames) {
            auto found = texts_of.find(frame);
            const Texts& own = group.null_text ? nulls : found == texts_of.end() ? texts : *found->second;
            of_frames.push_back(own[number]);
        }
    if (grouped_) {
        made["sees_past"] = sees(run, seen);
        made["sees_own"] = sees(run, frames);
        join_texts(of_frames, values, made);
    } else {
        values.insert(texts[number]->begin(), texts[number]->end());
    }
    for (const auto& [name, tensor] : made) values[name] = tensor;
    return values;
}

// The different ones among the texts of frames, one after the other, and the number of each frame's.
void Network::join_texts(const std::vector<Text>& of_frames, Values& values, Results& made) const {
    std::vector<Text> different;
    Tensor numbers({int64_t(of_frames.size())});
    numbers.kind = Kind::integer;
    for (size_t index = 0; index < of_frames.size(); ++index) {
        auto found = std::ranges::find(different, of_frames[index]);
        numbers.data[index] = float(found - different.begin());
        if (found == different.end()) different.push_back(of_frames[index]);
    }
    made["text_of"] = std::move(numbers);
    for (const auto& [name, first] : *different[0]) {
        std::vector<const Tensor*> parts;
        for (const Text& text : different) parts.push_back(&text->at(name));
        if (parts.size() == 1) values[name] = first;
        else made[name] = joined(parts);
    }
}

Tensor Network::guided(std::map<size_t, Tensor> velocities, const Pass& run, const Shape& shape) const {
    const std::vector<size_t> numbers = guide.branches_of(run);
    const std::vector<double> timesteps = run.timesteps();
    if (numbers.empty()) return Tensor(shape);
    for (size_t number : numbers) velocities.try_emplace(number, shape);
    Tensor total = velocities.at(numbers.back());
    for (size_t place = numbers.size() - 1; place > 0; --place) {
        const Tensor &own = velocities.at(numbers[place - 1]), &weaker = velocities.at(numbers[place]);
        for (size_t frame = 0; frame < timesteps.size(); ++frame) {
            auto scale = float(guide.scales_at(timesteps[frame])[numbers[place - 1]]);
            for (int64_t index = int64_t(frame) * total.stride(); index < int64_t(frame + 1) * total.stride(); ++index)
                total.data[index] += scale * (own.data[index] - weaker.data[index]);
        }
    }
    return total;
}

}  // namespace inferix
