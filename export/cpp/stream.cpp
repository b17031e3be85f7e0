#include "stream.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>

#include "archive.hpp"
#include "error.hpp"
#include "noise.hpp"

namespace inferix {
namespace {

Shape shape_after(int64_t first, const Shape& rest) {
    Shape shape{first};
    shape.insert(shape.end(), rest.begin(), rest.end());
    return shape;
}

Shape past_shape(const Plan& plan, int64_t window) {
    const Json& model = plan.at("model");
    return {window, plan.at("size").at("tokens").integer(), model.at("heads").integer(),
            model.at("channels").integer()};
}

template <class Map, class Kept>
void keep_known(Map& map, const Kept& kept) {
    std::erase_if(map, [&](const auto& entry) { return !kept.contains(entry.first); });
}

// Run `call` on a program; errors of a runtime, which may have several lines and no name in them, get the name.
template <class Call>
auto named(const ProgramEntry& entry, const char* failed, Call call) {
    try {
        return call();
    } catch (const UsageError&) {
        throw;
    } catch (const std::exception& error) {
        throw std::runtime_error("program " + in_quotes(entry.path.string()) + " " + failed + ": " + error.what());
    }
}

}  // namespace

Engine::Engine(Plan read, int threads)
    : plan(std::move(read)), policy(plan.at("preset")), prompts(plan), backend_(make_backend(plan, threads)) {
    for (const auto& [name, entry] : plan.at("programs").object) {
        ProgramEntry program = plan.program(name);
        programs_[name] = {program, named(program, "cannot be loaded", [&] { return backend_->load(program); })};
    }
}

Results Engine::run(const std::string& name, const Values& values) const {
    const Loaded& loaded = programs_.at(name);
    std::vector<View> inputs;
    for (const std::string& input : loaded.entry.inputs) inputs.push_back(values.at(input));
    std::vector<Tensor> results = named(loaded.entry, "failed", [&] { return loaded.program->run(inputs); });
    Results made;
    for (size_t index = 0; index < results.size(); ++index)
        made[loaded.entry.outputs[index]] = std::move(results[index]);
    return made;
}

Branch::Branch(const Plan& plan, Results rows)
    : text(std::move(rows)), frequencies(plan.at("rope").at("frequencies").reals()) {
    Shape shape = past_shape(plan, Policy(plan.at("preset")).window);
    for (int64_t layer = 0; layer < plan.at("model").at("layers").integer(); ++layer)
        for (const char* part : {"past_k_", "past_v_"}) past[part + std::to_string(layer)] = Tensor(shape);
}

void Branch::keep(const Frames& frames, const Frames& positions, Results results) {
    pending = frames;
    fresh = std::move(results);
    for (size_t index = 0; index < frames.size(); ++index) {
        stored[frames[index]] = positions[index];
        shifts[frames[index]] = 0;
        originals.erase(frames[index]);
    }
}

void Branch::bind(const std::map<int64_t, int64_t>& seen) {
    Frames frames;
    for (const auto& [frame, position] : seen) frames.push_back(frame);
    FixedWindow::Update update = slots.update(frames, pending);
    for (auto& [name, tensor] : past) {
        int64_t stride = tensor.stride();
        auto at = [&](int64_t slot) { return tensor.data.begin() + slot * stride; };
        for (auto [frame, slot] : update.writes) {
            int64_t index = std::ranges::find(pending, frame) - pending.begin();
            std::copy_n(fresh.at("new_" + name.substr(5)).data.begin() + index * stride, stride, at(slot));
        }
        for (auto [from, to] : update.moves) std::copy_n(at(from), stride, at(to));
    }
    pending.clear();
    fresh.clear();
    for (size_t slot = 0; slot < slots.frames.size(); ++slot) {
        int64_t frame = slots.frames[slot], shift = seen.at(frame) - stored.at(frame);
        if (shift != shifts.at(frame)) rotate(int64_t(slot), frame, shift);
    }
    keep_known(stored, seen);
    keep_known(shifts, seen);
    keep_known(originals, seen);
}

void Branch::rotate(int64_t slot, int64_t frame, int64_t shift) {
    bool known = originals.contains(frame);
    Results& original = originals[frame];
    for (auto& [name, tensor] : past) {
        if (!name.starts_with("past_k")) continue;
        int64_t stride = tensor.stride(), channels = tensor.shape.back();
        float* keys = tensor.data.data() + slot * stride;
        if (!known) original[name] = Tensor({stride}, std::vector<float>(keys, keys + stride));
        const float* source = original[name].data.data();
        for (int64_t head = 0; head < stride; head += channels)
            for (size_t pair = 0; pair < frequencies.size(); ++pair) {
                double even = source[head + 2 * pair], odd = source[head + 2 * pair + 1];
                double cos = std::cos(double(shift) * frequencies[pair]), sin = std::sin(double(shift) * frequencies[pair]);
                keys[head + 2 * pair] = float(even * cos - odd * sin);
                keys[head + 2 * pair + 1] = float(even * sin + odd * cos);
            }
    }
    shifts[frame] = shift;
}

Values Branch::inputs() const {
    Values values(text.begin(), text.end());
    for (const auto& [name, tensor] : past) {
        Shape shape = tensor.shape;
        shape[0] = int64_t(slots.frames.size());
        values[name] = View(tensor.data.data(), shape);
    }
    return values;
}

Stream::Stream(std::shared_ptr<const Engine> engine)
    : engine_(std::move(engine)),
      names_(engine_->plan.at("model").at("actions").strings()),
      actions_{{0, 0}},
      timeline_(engine_->policy) {}

Stream::Stream(std::shared_ptr<const Engine> engine, const std::string& prompt, uint64_t seed,
               const std::vector<std::string>& actions, const std::optional<std::string>& negative)
    : Stream(std::move(engine)) {
    seed_ = seed;
    const Plan& plan = engine_->plan;
    bool guided = plan.at("sampler").at("guidance_scale").real() != 1;
    if (guided != negative.has_value())
        throw UsageError(std::string("negative prompt: expected ") +
                         (guided ? "one, for a preset with guidance" : "none, for a preset without guidance"));
    for (size_t index = 0; index < actions.size(); ++index) actions_[int64_t(index) + 1] = action_number(actions[index]);
    if (!actions.empty()) actions_[int64_t(actions.size()) + 1] = 0;
    rows_ = engine_->prompts.encode(prompt);
    branches_.emplace_back(plan, condition(rows_));
    if (negative) branches_.emplace_back(plan, condition(engine_->prompts.encode(*negative)));
    for (const Json& shape : plan.at("decoder").at("state").items()) state_.emplace_back(shape.integers());
}

int64_t Stream::action_number(const std::string& action) const {
    if (names_.empty()) throw UsageError("action " + in_quotes(action) + ": this model follows no actions, only its prompt");
    auto found = std::ranges::find(names_, action);
    if (found == names_.end()) {
        std::string listed;
        for (const std::string& name : names_) listed += (listed.empty() ? "" : ", ") + name;
        throw UsageError("no action " + in_quotes(action) + "; there are " + listed);
    }
    return found - names_.begin();
}

void Stream::prompt(const std::string& text) {
    Tensor rows = engine_->prompts.encode(text);
    std::string prefix = engine_->plan.at("preset").at("scene_cut_prefix").string();
    prefix.erase(prefix.find_last_not_of(" \t\r\n") + 1);
    if (!prefix.empty() && text.starts_with(prefix)) timeline_.cut_shot();
    bool blends = engine_->policy.blends && timeline_.next_frame > 0;
    int64_t blocks = blends ? engine_->policy.blend_blocks : 1;
    change_ = Change{rows_, std::move(rows), blocks, blocks};
}

void Stream::act(const std::string& action) {
    int64_t number = action_number(action);
    actions_.erase(actions_.lower_bound(timeline_.next_frame), actions_.end());
    actions_[timeline_.next_frame] = number;
}

MadeBlock Stream::next_block(bool decoded) {
    MadeBlock made;
    follow_prompt();
    Block block = denoise(made.latents);
    commit(block, made.latents);
    made.index = block.index;
    if (decoded) made.frames = decode(made.latents, made.pictures);
    return made;
}

void Stream::follow_prompt() {
    if (!change_) return;
    Change& change = *change_;
    double share = change.blocks > 1 ? 1 - double(change.left - 1) / double(change.blocks - 1) : 1;
    rows_ = change.after;
    if (share != 1)
        for (size_t index = 0; index < rows_.data.size(); ++index)
            rows_.data[index] = change.before.data[index] +
                                float(share) * (change.after.data[index] - change.before.data[index]);
    if (--change.left == 0) change_.reset();
    Branch& branch = branches_[0];
    branch.text = condition(rows_);
    if (std::optional<Pass> pass = timeline_.recache_pass()) {
        Tensor latents(shape_after(1, shape_after(int64_t(pass->frames.size()),
                                                  engine_->plan.at("size").at("latent").integers())));
        auto place = latents.data.begin();
        for (int64_t frame : pass->frames) place = std::ranges::copy(latents_.at(frame), place).out;
        keep(branch, *pass, {{"latents", latents}});
    }
}

Block Stream::denoise(Tensor& latents) {
    const Json& sampler = engine_->plan.at("sampler");
    Block block = timeline_.admit();
    Pass pass = timeline_.denoise_pass(block.frames);
    const Json& first = sampler.at("first");
    auto rows = [](const Json& solver) {
        std::vector<std::vector<double>> made;
        for (const Json& row : solver.at("matrix").items()) made.push_back(row.reals());
        return made;
    };
    bool own = block.index == 0 && rows(first) != rows(sampler);
    const Json& solver = own ? first : sampler;
    const std::vector<double> timesteps = solver.at("timesteps").reals();
    const Shape shape = engine_->plan.at("size").at("latent").integers();
    std::vector<Tensor> seen;  // draws of noise, then velocities: what a row of the matrix weighs
    for (int64_t draw = 0; draw < solver.at("draws").integer(); ++draw)
        seen.push_back(normals(seed_, block.frames, uint32_t(draw), shape));
    latents = seen[0];
    Shape batch = shape_after(1, latents.shape);
    bool whole = engine_->has("steps") && !own && branches_.size() == 1;
    if (whole) {
        Tensor noise(shape_after(int64_t(seen.size()), latents.shape));
        auto place = noise.data.begin();
        for (const Tensor& draw : seen) place = std::ranges::copy(draw.data, place).out;
        Results made;
        Values values = pass_inputs(pass, branches_[0], timesteps[0], made);
        values["noise"] = noise;
        latents.data = std::move(engine_->run("steps", values).at("clean").data);
    }
    for (size_t step = 0; !whole && step < timesteps.size(); ++step) {
        std::vector<Tensor> velocities;
        for (Branch& branch : branches_) {
            Results made;
            Values values = pass_inputs(pass, branch, timesteps[step], made);
            values["latents"] = View(latents.data.data(), batch);
            velocities.push_back(std::move(engine_->run("step", values).at("velocity")));
        }
        if (velocities.size() > 1) {
            auto scale = float(sampler.at("guidance_scale").real());
            for (size_t index = 0; index < latents.data.size(); ++index) {
                float negative = velocities[1].data[index];
                velocities[0].data[index] = negative + scale * (velocities[0].data[index] - negative);
            }
        }
        seen.push_back(std::move(velocities[0]));
        std::vector<double> weights = solver.at("matrix").items()[step].reals();
        for (size_t index = 0; index < latents.data.size(); ++index) {
            double total = 0;
            for (size_t term = 0; term < weights.size(); ++term)
                if (weights[term] != 0) total += weights[term] * double(seen[term].data[index]);
            latents.data[index] = float(total);
        }
    }
    if (!std::ranges::all_of(latents.data, [](float value) { return std::isfinite(value); }))
        throw std::runtime_error("block " + std::to_string(block.index) + " is not finite; export another checkpoint");
    return block;
}

void Stream::commit(const Block& block, const Tensor& latents) {
    Pass pass = timeline_.commit_pass(block.frames);
    View batch(latents.data.data(), shape_after(1, latents.shape));
    for (Branch& branch : branches_) keep(branch, pass, {{"latents", batch}});
    timeline_.forget(pass.context);
    int64_t stride = latents.stride(), oldest = block.frames.back() + 1 - engine_->policy.window;
    for (size_t index = 0; index < block.frames.size(); ++index) {
        auto begin = latents.data.begin() + int64_t(index) * stride;
        latents_[block.frames[index]] = std::vector<float>(begin, begin + stride);
    }
    std::erase_if(latents_, [&](const auto& entry) {
        return entry.first < oldest && std::ranges::find(pass.context, entry.first) == pass.context.end();
    });
}

std::vector<uint8_t> Stream::decode(const Tensor& latents, int64_t& pictures) {
    const Json& decoder = engine_->plan.at("decoder");
    std::vector<uint8_t> made;
    Shape one = latents.shape;
    one[0] = 1;
    for (int64_t index = 0; index < latents.shape[0]; ++index, ++decoded_) {
        Values values{{"latents", View(latents.data.data() + index * latents.stride(), one)}};
        for (size_t slot = 0; slot < state_.size(); ++slot) values["state_" + std::to_string(slot)] = state_[slot];
        Results results = engine_->run(decoded_ ? "decode_next" : decoder.at("first").string(), values);
        for (size_t slot = 0; slot < state_.size(); ++slot)
            if (auto found = results.find("next_" + std::to_string(slot)); found != results.end())
                state_[slot] = std::move(found->second);
        const Tensor& pixels = results.at("pixels");  // [T, 3, H, W] in [-1, 1]
        int64_t count = pixels.shape[0], plane = pixels.shape[2] * pixels.shape[3];
        int64_t begin = decoded_ ? 0 : count - decoder.at("first_pictures").integer();
        for (int64_t picture = begin; picture < count; ++picture, ++pictures)
            for (int64_t place = 0; place < plane; ++place)
                for (int64_t colour = 0; colour < 3; ++colour) {
                    float value = pixels.data[(picture * 3 + colour) * plane + place];
                    made.push_back(uint8_t(std::clamp(std::nearbyint((value * 0.5f + 0.5f) * 255), 0.f, 255.f)));
                }
    }
    return made;
}

Results Stream::condition(const Tensor& rows) const { return engine_->run("prompt", {{"rows", rows}}); }

void Stream::keep(Branch& branch, const Pass& pass, Values values) {
    Results made;
    values.merge(pass_inputs(pass, branch, engine_->plan.at("sampler").at("context_timestep").real(), made));
    std::map<int64_t, int64_t> all = positions(pass);
    Frames own;
    for (int64_t frame : pass.frames) own.push_back(all.at(frame));
    branch.keep(pass.frames, own, engine_->run("commit", values));
}

std::map<int64_t, int64_t> Stream::positions(const Pass& pass) const {
    // where positions move with the window, they count on from the pass's own frames, so that keys can stay as they are
    int64_t moved = engine_->policy.moving ? pass.frames[0] - pass.position_of(pass.frames[0]) : 0;
    std::map<int64_t, int64_t> made;
    for (size_t index = 0; index < pass.context.size(); ++index)
        made[pass.context[index]] = pass.positions[index] + moved;
    return made;
}

Values Stream::pass_inputs(const Pass& pass, Branch& branch, double timestep, Results& made) {
    std::map<int64_t, int64_t> all = positions(pass), seen = all;
    for (int64_t frame : pass.frames) seen.erase(frame);
    branch.bind(seen);
    int64_t count = int64_t(pass.frames.size()), pairs = int64_t(branch.frequencies.size());
    Tensor cos({count, pairs}), sin({count, pairs});
    for (int64_t index = 0; index < count; ++index)
        for (int64_t pair = 0; pair < pairs; ++pair) {
            double angle = double(all.at(pass.frames[index])) * branch.frequencies[pair];
            cos.data[index * pairs + pair] = float(std::cos(angle));
            sin.data[index * pairs + pair] = float(std::sin(angle));
        }
    made["rope_cos"] = std::move(cos);
    made["rope_sin"] = std::move(sin);
    made["timesteps"] = Tensor({1, count}, std::vector<float>(count, float(timestep)));
    if (!names_.empty()) {
        Tensor chosen({1, count, int64_t(names_.size())});
        for (int64_t index = 0; index < count; ++index) {
            int64_t number = std::prev(actions_.upper_bound(pass.frames[index]))->second;
            chosen.data[index * int64_t(names_.size()) + number] = 1;
        }
        made["actions"] = std::move(chosen);
    }
    Values values = branch.inputs();
    for (const auto& [name, tensor] : made) values[name] = tensor;
    return values;
}

template <class Archive>
void Stream::transfer(Archive& archive) {
    Timeline& t = timeline_;
    archive(seed_, actions_, t.next_block, t.next_frame, t.shot, t.pin_next, t.sink, t.pinned, t.places, rows_,
            latents_, state_, decoded_);
    bool changing = change_.has_value();
    archive(changing);
    if (changing) {
        if (!change_) change_.emplace();
        archive(change_->before, change_->after, change_->left, change_->blocks);
    }
    for (Branch& b : branches_)
        archive(b.text, b.slots.frames, b.past, b.pending, b.fresh, b.stored, b.shifts, b.originals);
}

void Stream::save(const std::filesystem::path& path) const {
    SaveFile file(path, engine_->plan.fingerprint());
    uint64_t branches = branches_.size();
    file(branches);
    const_cast<Stream*>(this)->transfer(file);  // an archive that writes changes nothing
    file.finish();
}

Stream Stream::restore(std::shared_ptr<const Engine> engine, const std::filesystem::path& path) {
    LoadFile file(path, engine->plan.fingerprint());
    Stream stream(std::move(engine));
    uint64_t branches = 0;
    file(branches);
    if (branches < 1 || branches > 2) throw file.damaged();
    for (uint64_t branch = 0; branch < branches; ++branch) stream.branches_.emplace_back(stream.engine_->plan, Results());
    stream.transfer(file);
    file.finish();
    return stream;
}

void check_plan(const Plan& plan) {
    const Json& check = plan.at("noise").at("check");
    Frames frame{check.at("frame").integer()};
    Tensor noise = normals(uint64_t(check.at("seed").integer()), frame, uint32_t(check.at("draw").integer()), {2, 2, 2});
    std::vector<double> expected = check.at("normals").reals();
    for (size_t index = 0; index < expected.size(); ++index)
        if (noise.data[index] != float(expected[index]))
            throw UsageError("noise of the plan differs at element " + std::to_string(index));
    Timeline timeline{Policy(plan.at("preset"))};
    for (const Json& window : plan.at("check").at("windows").items()) {
        Block block = timeline.admit();
        Pass pass = timeline.commit_pass(block.frames);
        if (pass.frames != window.at("frames").integers() || pass.context != window.at("context").integers() ||
            pass.positions != window.at("positions").integers())
            throw UsageError("window of block " + std::to_string(block.index) + " differs from the plan's");
        timeline.forget(pass.context);
    }
}

}  // namespace inferix
