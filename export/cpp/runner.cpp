// inferix-runner: play an exported engine without Python. Arguments are those of inferix-run.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>

#include "error.hpp"
#include "stream.hpp"
#include "y4m.hpp"

namespace {

using namespace inferix;

constexpr const char* help = R"(usage: inferix-runner ENGINE [options]

Play an exported engine. Where prompt, actions, length and seed are not given, they are those of inferix generate.

  --size WxH              refuse an engine of another size
  --prompt TEXT           content of the video
  --prompt-at SECONDS TEXT  change the prompt at a time; repeatable
  --negative-prompt TEXT  content to avoid, for presets with guidance
  --actions WORDS         one per latent frame, such as '8R 4U stay'
  --blocks N              length in blocks
  --seconds S             length in seconds, rounded up to whole blocks
  --seed N                seed of the noise
  --out FILE              video, a .y4m file, or - for stdout [default: out.y4m]
  --latents FILE          write the latents too, as a NumPy file [F, C, h, w]
  --save FILE             write the stream's state at the end
  --restore FILE          continue a saved stream
  --threads N             threads of a program [default: one per core]
  --json                  one JSON line on stdout: blocks, frames, seconds, outputs
  --check                 compare noise and windows with the plan, and exit
  --version               this version, and the targets whose engines this build plays

Exit codes: 1 for a run that failed, 2 for a bad argument or a damaged engine; one line on stderr says which.

example: inferix-runner world --prompt "a blue fox in a meadow by day" --actions "8R 4U" --out fox.y4m
)";

struct Options {
    std::string folder, out = "out.y4m";
    std::optional<std::string> size, prompt, negative, actions, latents, save, restore;
    std::vector<std::pair<double, std::string>> cues;
    std::optional<int64_t> blocks;
    std::optional<double> seconds;
    std::optional<uint64_t> seed;
    int threads = 0;
    bool check = false, json = false;
};

template <class Number>
Number number_of(const std::string& flag, const std::string& text) {
    Number number{};
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size())
        throw UsageError(flag + " is " + in_quotes(text) + "; expected a number");
    return number;
}

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    for (size_t index = 0; index < arguments.size(); ++index) {
        const std::string& flag = arguments[index];
        auto next = [&]() -> const std::string& {
            if (++index >= arguments.size()) throw UsageError(flag + " has no value; see --help");
            return arguments[index];
        };
        if (flag == "--size") options.size = next();
        else if (flag == "--prompt") options.prompt = next();
        else if (flag == "--prompt-at") {
            auto at = number_of<double>(flag, next());
            options.cues.emplace_back(at, next());
        } else if (flag == "--negative-prompt") options.negative = next();
        else if (flag == "--actions") options.actions = next();
        else if (flag == "--blocks") options.blocks = number_of<int64_t>(flag, next());
        else if (flag == "--seconds") options.seconds = number_of<double>(flag, next());
        else if (flag == "--seed") options.seed = number_of<uint64_t>(flag, next());
        else if (flag == "--out") options.out = next();
        else if (flag == "--latents") options.latents = next();
        else if (flag == "--save") options.save = next();
        else if (flag == "--restore") options.restore = next();
        else if (flag == "--threads") options.threads = number_of<int>(flag, next());
        else if (flag == "--check") options.check = true;
        else if (flag == "--json") options.json = true;
        else if (flag.starts_with("-") || !options.folder.empty())
            throw UsageError("no option " + in_quotes(flag) + "; see --help");
        else options.folder = flag;
    }
    if (options.folder.empty()) throw UsageError("the engine's folder is missing; see --help");
    return options;
}

// Actions of words such as `8R 4U stay`: a count, then a name or its first letter.
std::vector<std::string> read_actions(const std::string& text, const std::vector<std::string>& names) {
    constexpr int64_t longest = 100'000;
    std::vector<std::string> actions;
    std::string word;
    for (char next : text + " ") {
        if (!std::isspace(static_cast<unsigned char>(next))) {
            word += char(std::tolower(static_cast<unsigned char>(next)));
            continue;
        }
        if (word.empty()) continue;
        size_t digits = std::min(word.find_first_not_of("0123456789"), word.size());
        int64_t count = digits ? number_of<int64_t>("--actions", word.substr(0, digits)) : 1;
        std::string name = word.substr(digits);
        for (const std::string& known : names)
            if (name == known || (name.size() == 1 && known.starts_with(name))) {
                name = known;
                break;
            }
        if (name.empty() || count > longest - int64_t(actions.size()))
            throw UsageError("--actions holds " + in_quotes(word) + "; expected words such as 8R, 100000 actions at most");
        actions.insert(actions.end(), size_t(count), name);
        word.clear();
    }
    return actions;
}

// The prompts of cues by the block that each precedes: the first that begins at its time or later.
std::map<int64_t, std::string> schedule(const Options& options, const Policy& policy, int64_t blocks, int64_t fps,
                                        int64_t stride) {
    std::map<int64_t, std::string> changes;
    double before = 0, begins = 0;
    int64_t block = 0, frame = 0;
    for (const auto& [at, prompt] : options.cues) {
        if (!(at > before)) throw UsageError("--prompt-at: times must be above 0 and in order");
        while (begins < at) {
            frame += policy.block_size(frame);
            if (++block >= blocks)
                throw UsageError("--prompt-at " + std::to_string(at) + " is beyond the last block; make the video longer");
            begins = double((frame - 1) * stride + 1) / double(fps);
        }
        if (!changes.emplace(block, prompt).second)
            throw UsageError("--prompt-at: two prompts fall on the block at " + std::to_string(begins) + " s");
        before = at;
    }
    return changes;
}

void write_npy(const std::string& path, const std::vector<float>& values, const Shape& shape) {
    std::string sizes;
    for (int64_t size : shape) sizes += std::to_string(size) + ", ";
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + sizes + "), }";
    header.resize((10 + header.size()) / 64 * 64 + 64 - 11, ' ');
    header += '\n';
    std::string part = path + ".part";
    std::ofstream file(part, std::ios::binary);
    file << std::string("\x93NUMPY\x01\x00", 8) << char(header.size() & 255) << char(header.size() >> 8) << header;
    file.write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(float)));
    file.close();
    if (!file) {
        std::remove(part.c_str());
        throw std::runtime_error(in_quotes(path) + " cannot be written; is the disk full?");
    }
    std::filesystem::rename(part, path);
}

// A string of JSON.
std::string json_string(const std::string& text) {
    std::string made = "\"";
    for (char next : text) {
        char code[8];
        if (next == '"' || next == '\\') made += '\\';
        if (static_cast<unsigned char>(next) >= 0x20) made += next;
        else made += (std::snprintf(code, sizeof code, "\\u%04x", next), code);
    }
    return made + '"';
}

void run(const Options& options) {
    bool to_stdout = options.out == "-";
    if (to_stdout && options.json) throw UsageError("--json and --out - both write to stdout; give --out a file");
    if (!to_stdout && !options.out.ends_with(".y4m"))
        throw UsageError("--out " + in_quotes(options.out) + " must end in .y4m, or be - for stdout");
    Plan plan = Plan::read(options.folder);
    const Policy policy(plan.json);
    if (options.check) {
        check_plan(plan);
        std::puts("noise and windows are those of the plan");
        return;
    }
    const Json &model = plan.at("model"), &defaults = plan.at("defaults"), &size = plan.at("size");
    const std::vector<int64_t> picture = size.at("picture").integers();
    std::string made_size = std::to_string(picture.at(0)) + "x" + std::to_string(picture.at(1));
    if (options.size && *options.size != made_size)
        throw UsageError("--size is " + in_quotes(*options.size) + ", but engine " + in_quotes(options.folder) +
                         " makes " + made_size + "; export it again with that size");
    int64_t fps = model.at("fps").integer(), stride = size.at("pictures_per_latent").integer();
    std::optional<int64_t> length = options.blocks;
    if (options.seconds) {
        if (!(*options.seconds > 0 && *options.seconds < 1e6))
            throw UsageError("--seconds is " + std::to_string(*options.seconds) + "; expected a number above 0");
        const Json& decoder = plan.at("decoder");
        int64_t tile = decoder.has("frames") ? decoder.at("frames").integer() : 1;  // latent frames decoded at once
        int64_t first = decoder.at("first_pictures").integer() - (tile - 1) * stride;
        int64_t later = std::max<int64_t>(std::llround(*options.seconds * double(fps)) - first, 0);
        length = policy.blocks_for((later + stride - 1) / stride + 1);
    }
    std::optional<std::string> words = options.actions;
    if (!words && !length && !options.restore && defaults.at("actions").kind == Json::Kind::text)
        words = defaults.at("actions").string();
    std::vector<std::string> script;
    if (words) script = read_actions(*words, model.at("actions").strings());
    int64_t needed = policy.blocks_for(int64_t(script.size()) + 1);
    int64_t blocks = length.value_or(script.empty() ? defaults.at("blocks").integer() : needed);
    if (blocks < 1 || (!script.empty() && needed != blocks))
        throw UsageError("the length is " + std::to_string(blocks) + " blocks, with " + std::to_string(script.size()) +
                         " actions; expected one block or more, and one action for each latent frame but the first");
    if (options.restore && (options.prompt || options.seed || options.actions || options.negative))
        throw UsageError("--restore continues with the saved prompt, seed and actions; leave them out");
    auto cues = schedule(options, policy, blocks, fps, stride);
    const std::string prompt = options.prompt.value_or(defaults.at("prompt").string());
    const uint64_t seed = options.seed.value_or(uint64_t(defaults.at("seed").integer()));
    const PromptTable prompts(plan);  // programs take seconds to load, so prompts are looked up before
    if (!options.restore) prompts.encode(prompt);
    for (const auto& [block, text] : cues) prompts.encode(text);
    auto engine = std::make_shared<const Engine>(plan, options.threads);
    Stream stream = options.restore ? Stream::restore(engine, *options.restore)
                                    : Stream(engine, prompt, seed, script, options.negative);
    Y4mWriter writer(options.out, picture[0], picture[1], fps);
    std::vector<float> latents;
    Shape shape;
    int64_t frames = 0, pictures = 0;
    auto begun = std::chrono::steady_clock::now();
    for (int64_t block = 0; block < blocks; ++block) {
        if (auto cue = cues.find(block); cue != cues.end()) stream.prompt(cue->second);
        MadeBlock made = stream.next_block();
        writer.add(made.frames);
        pictures += made.pictures;
        frames += made.latents.shape[0];
        shape = made.latents.shape;
        if (options.latents) latents.insert(latents.end(), made.latents.data.begin(), made.latents.data.end());
        std::fprintf(stderr, "\rblock %lld/%lld", static_cast<long long>(block + 1), static_cast<long long>(blocks));
    }
    std::fputs("\n", stderr);
    writer.finish();
    shape[0] = frames;
    if (options.latents) write_npy(*options.latents, latents, shape);
    if (options.save) stream.save(*options.save);
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
    if (options.json) {
        std::string outputs = json_string(options.out);
        for (const auto& path : {options.latents, options.save})
            if (path) outputs += ", " + json_string(*path);
        std::printf("{\"blocks\": %lld, \"frames\": %lld, \"seconds\": %.6f, \"outputs\": [%s]}\n",
                    static_cast<long long>(blocks), static_cast<long long>(pictures), seconds.count(), outputs.c_str());
        return;
    }
    std::fprintf(stderr, "%lld blocks, %lld frames, %.1f s\n", static_cast<long long>(blocks),
                 static_cast<long long>(pictures), seconds.count());
}

}  // namespace

int main(int count, char** values) {
    std::vector<std::string> arguments(values + 1, values + count);
    if (std::ranges::find(arguments, "--help") != arguments.end()) {
        std::fputs(help, stdout);
        return 0;
    }
    if (std::ranges::find(arguments, "--version") != arguments.end()) {
        std::string targets;
        for (const std::string& target : built_targets()) targets += (targets.empty() ? "" : ", ") + target;
        std::printf("inferix-runner %s, targets: %s\n", INFERIX_VERSION, targets.empty() ? "none" : targets.c_str());
        return 0;
    }
    try {
        run(parse(arguments));
    } catch (const UsageError& error) {
        std::fprintf(stderr, "error: %s\n", one_line(error.what()).c_str());
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", one_line(error.what()).c_str());
        return 1;
    }
    return 0;
}
