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
    : plan(std::move(read)), policy(plan.json), prompts(plan), backend_(make_backend(plan, threads)) {
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

Stream::Stream(std::shared_ptr<const Engine> engine)
    : engine_(std::move(engine)),
      names_(engine_->plan.at("model").at("actions").strings()),
      timeline_(engine_->policy),
      network_(*engine_) {}

Stream::Stream(std::shared_ptr<const Engine> engine, const std::string& prompt, uint64_t seed,
               const std::vector<std::string>& actions, const std::optional<std::string>& negative)
    : Stream(std::move(engine)) {
    seed_ = seed;
    const Plan& plan = engine_->plan;
    bool guided = network_.guide.needs_negative() || engine_->policy.clean_null;
    std::string expected = "none, for a preset without guidance";
    if (guided) expected = "one, for a preset with clean frames under a null caption";
    if (network_.guide.needs_negative()) expected = "one, for a preset with guidance";
    if (guided < negative.has_value() || (guided && !negative && !engine_->prompts.has_null()))
        throw UsageError("negative prompt: expected " + expected);
    for (size_t index = 0; index < actions.size(); ++index)
        network_.actions[int64_t(index) + 1] = action_number(actions[index]);
    if (!actions.empty()) network_.actions[int64_t(actions.size()) + 1] = 0;
    rows_ = engine_->prompts.encode(prompt);
    network_.begin(rows_, negative ? engine_->prompts.encode(*negative) : engine_->prompts.nothing());
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
    network_.actions.erase(network_.actions.lower_bound(timeline_.next_frame), network_.actions.end());
    network_.actions[timeline_.next_frame] = number;
}

MadeBlock Stream::next_block(bool decoded) {
    MadeBlock made;
    bool changes = change_ || timeline_.pin_next;
    if (timeline_.uncommitted && changes && !engine_->policy.clean_null) {
        commit(*timeline_.uncommitted, uncommitted_);
        timeline_.uncommitted.reset();
    }
    follow_prompt();
    Texts texts;
    Block block = denoise(made.latents, texts);
    if (engine_->policy.commit_in_next) {
        timeline_.uncommitted = block;
        uncommitted_ = made.latents;
    } else {
        commit(block, made.latents, texts);
    }
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
    if (engine_->policy.joins)
        for (InFlight& block : flight_)
            if (block.texts.empty()) block.texts = network_.texts;
    network_.follow(rows_);
    if (std::optional<ScheduledPass> recache = timeline_.recache_pass()) {
        const Frames frames = recache->run.frames();
        Tensor latents(shape_after(int64_t(frames.size()), engine_->plan.at("size").at("latent").integers()));
        auto place = latents.data.begin();
        for (int64_t frame : frames) place = std::ranges::copy(latents_.at(frame), place).out;
        network_.recompute(*recache, latents);
    }
}

Block Stream::denoise(Tensor& latents, Texts& texts) {
    const Json &sampler = engine_->plan.at("sampler"), &first = sampler.at("first");
    auto rows = [](const Json& solver) {
        std::vector<std::vector<double>> made;
        for (const Json& row : solver.at("matrix").items()) made.push_back(row.reals());
        return made;
    };
    bool own = timeline_.next_block == 0 && rows(first) != rows(sampler);
    const Json& solver = own ? first : sampler;
    const std::vector<double> timesteps = solver.at("timesteps").reals();
    Frames seen;
    while (progress_.empty() || progress_[0].step < int64_t(timesteps.size())) {
        if (timeline_.joins(progress_)) admit(solver.at("draws").integer());
        ScheduledPass scheduled = timeline_.denoise_pass(progress_, timesteps, seen);
        if (std::optional<Frames> cached = scheduled.window()) timeline_.forget(*cached);
        if (engine_->has("steps") && !own && network_.texts.size() == 1) {
            Tensor noise(shape_after(int64_t(flight_[0].seen.size()), flight_[0].latents.shape));
            auto place = noise.data.begin();
            for (const Tensor& draw : flight_[0].seen) place = std::ranges::copy(draw.data, place).out;
            flight_[0].latents = network_.run_steps(scheduled, noise);
            progress_[0].step = int64_t(timesteps.size());
        } else {
            take_step(scheduled, solver);
        }
    }
    Block block = progress_[0].block;
    latents = std::move(flight_[0].latents);
    texts = std::move(flight_[0].texts);
    progress_.erase(progress_.begin());
    flight_.erase(flight_.begin());
    if (!std::ranges::all_of(latents.data, [](float value) { return std::isfinite(value); }))
        throw std::runtime_error("block " + std::to_string(block.index) + " is not finite; export another checkpoint");
    return block;
}

// Admit the next block of the timeline, and draw its noise.
void Stream::admit(int64_t draws) {
    const Shape shape = engine_->plan.at("size").at("latent").integers();
    Block block = timeline_.admit();
    timeline_.follow_rest(network_.resting_since(block.frames.front() - 1));
    InFlight made;
    for (int64_t draw = 0; draw < draws; ++draw)
        made.seen.push_back(normals(seed_, block.frames, uint32_t(draw), shape));
    float scale = engine_->policy.noise_scale;
    for (size_t index = 0; index < block.frames.size(); ++index) {
        if (scale == 1 || network_.rests(block.frames[index])) continue;
        int64_t stride = made.seen[0].stride();
        auto begin = made.seen[0].data.begin() + int64_t(index) * stride;
        std::for_each_n(begin, stride, [&](float& value) { value *= scale; });
    }
    made.latents = made.seen[0];
    progress_.push_back({std::move(block), 0});
    flight_.push_back(std::move(made));
}

// Run one step of the blocks in flight, and advance their latents by the solver.
void Stream::take_step(const ScheduledPass& scheduled, const Json& solver) {
    std::vector<const Tensor*> parts;
    std::map<int64_t, const Texts*> texts;
    if (scheduled.commits) parts.push_back(&uncommitted_);
    for (size_t index = 0; index < flight_.size(); ++index) {
        parts.push_back(&flight_[index].latents);
        if (flight_[index].texts.empty()) continue;
        for (int64_t frame : progress_[index].block.frames) texts[frame] = &flight_[index].texts;
    }
    Tensor velocity = network_.run(scheduled, joined(parts), texts);
    int64_t begin = scheduled.commits ? uncommitted_.shape[0] : 0;
    for (size_t number = 0; number < flight_.size(); ++number) {
        InFlight& block = flight_[number];
        int64_t end = begin + block.latents.shape[0];
        block.seen.push_back(rows_of(velocity, begin, end));
        begin = end;
        const std::vector<double> weights = solver.at("matrix").items()[progress_[number].step++].reals();
        for (size_t index = 0; index < block.latents.data.size(); ++index) {
            double total = 0;
            for (size_t term = 0; term < weights.size(); ++term)
                if (weights[term] != 0) total += weights[term] * double(block.seen[term].data[index]);
            block.latents.data[index] = float(total);
        }
    }
}

void Stream::commit(const Block& block, const Tensor& latents, const Texts& texts) {
    ScheduledPass scheduled = timeline_.commit_pass(block.frames);
    std::map<int64_t, const Texts*> own;
    if (!texts.empty())
        for (int64_t frame : block.frames) own[frame] = &texts;
    network_.run(scheduled, latents, own);
    const Frames context = scheduled.window().value();
    timeline_.forget(context);
    int64_t stride = latents.stride(), oldest = block.frames.back() + 1 - engine_->policy.window;
    for (size_t index = 0; index < block.frames.size(); ++index) {
        auto begin = latents.data.begin() + int64_t(index) * stride;
        latents_[block.frames[index]] = std::vector<float>(begin, begin + stride);
    }
    std::erase_if(latents_, [&](const auto& entry) { return entry.first < oldest && !contains(context, entry.first); });
}

std::vector<uint8_t> Stream::decode(const Tensor& latents, int64_t& pictures) {
    const Json& decoder = engine_->plan.at("decoder");
    std::vector<uint8_t> made;
    Shape one = latents.shape;
    one[0] = decoder.has("frames") ? decoder.at("frames").integer() : 1;
    for (int64_t index = 0; index < latents.shape[0]; index += one[0], ++decoded_) {
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

template <class Archive>
void Stream::transfer(Archive& archive) {
    Timeline& t = timeline_;
    archive(seed_, t.next_block, t.next_frame, t.shot, t.pin_next, t.sink, t.pinned, t.places, rows_,
            latents_, state_, decoded_);
    bool changing = change_.has_value();
    archive(changing);
    if (changing) {
        if (!change_) change_.emplace();
        archive(change_->before, change_->after, change_->left, change_->blocks);
    }
    transfer_texts(archive);
    bool waits = t.uncommitted.has_value();
    archive(waits);
    if (waits) {
        if (!t.uncommitted) t.uncommitted.emplace();
        archive(t.uncommitted->index, t.uncommitted->frames, uncommitted_);
    }
    network_.transfer(archive);
}

// Texts that several branches or blocks follow are one text before and after.
template <class Archive>
void Stream::transfer_texts(Archive& archive) {
    uint64_t blocks = flight_.size();
    archive(blocks);
    if constexpr (Archive::reads)
        if (blocks > uint64_t(engine_->policy.window_blocks)) throw archive.damaged();
    flight_.resize(blocks);
    progress_.resize(blocks);
    std::vector<Texts*> lists{&network_.texts, &network_.nulls};
    for (size_t index = 0; index < blocks; ++index) {
        Progress& one = progress_[index];
        archive(one.block.index, one.block.frames, one.step, flight_[index].seen, flight_[index].latents);
        lists.push_back(&flight_[index].texts);
    }
    std::vector<Text> known;
    for (const Texts* list : lists)
        for (const Text& text : *list)
            if (std::ranges::find(known, text) == known.end()) known.push_back(text);
    uint64_t count = known.size();
    archive(count);
    for (uint64_t number = 0; number < count; ++number) {
        Results content;
        if (number < known.size()) content = *known[number];
        archive(content);
        if (number >= known.size()) known.push_back(std::make_shared<Results>(std::move(content)));
    }
    for (Texts* list : lists) {
        std::vector<uint64_t> numbers;
        for (const Text& text : *list) numbers.push_back(uint64_t(std::ranges::find(known, text) - known.begin()));
        archive(numbers);
        list->clear();
        for (uint64_t number : numbers) list->push_back(known.at(number));
    }
}

void Stream::save(const std::filesystem::path& path) const {
    SaveFile file(path, engine_->plan.fingerprint());
    const_cast<Stream*>(this)->transfer(file);  // an archive that writes changes nothing
    file.finish();
}

Stream Stream::restore(std::shared_ptr<const Engine> engine, const std::filesystem::path& path) {
    LoadFile file(path, engine->plan.fingerprint());
    Stream stream(std::move(engine));
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
    Timeline timeline{Policy(plan.json)};
    const Json& sampler = plan.at("sampler");
    const std::vector<Json>& listed = plan.at("check").at("windows").items();
    std::vector<Progress> flight;
    for (size_t place = 0; place < listed.size();) {
        const std::vector<double> timesteps =
            (timeline.next_block == 0 ? sampler.at("first") : sampler).at("timesteps").reals();
        ScheduledPass last;
        Frames seen;
        while (flight.empty() || flight[0].step < int64_t(timesteps.size())) {
            if (timeline.joins(flight)) flight.push_back({timeline.admit(), 0});
            last = timeline.denoise_pass(flight, timesteps, seen);
            for (Progress& one : flight) ++one.step;
        }
        Block block = flight[0].block;
        flight.erase(flight.begin());
        if (timeline.policy.commit_in_next) timeline.uncommitted = block;
        else last = timeline.commit_pass(block.frames);
        if (std::optional<Frames> cached = last.window()) timeline.forget(*cached);
        for (const Group& group : last.run.groups) {
            const Json& window = listed.at(place++);
            if (group.frames != window.at("frames").integers() || group.context != window.at("context").integers() ||
                group.positions != window.at("positions").integers())
                throw UsageError("window of block " + std::to_string(block.index) + " differs from the plan's");
        }
    }
}

}  // namespace inferix
