#include "inferix.h"

#include <exception>
#include <string>

#include "error.hpp"
#include "stream.hpp"

struct inferix_stream {
    inferix::Stream stream;
    inferix::MadeBlock block;
};

namespace {

thread_local std::string last_error;

// Run a call at the edge to C, which no exception may cross; true if it succeeded.
template <class Call>
bool succeeded(Call call) {
    try {
        call();
        return true;
    } catch (const std::exception& error) {
        last_error = inferix::one_line(error.what());
    }
    return false;
}

// What a pointer points to; UsageError for NULL.
template <class Value>
Value& given(Value* value, const char* name) {
    if (value == nullptr) throw inferix::UsageError(std::string(name) + " is NULL; expected a value");
    return *value;
}

const char* text(const char* value, const char* name) { return &given(value, name); }

}  // namespace

inferix_stream* inferix_open(const char* folder, const char* prompt, const char* negative_prompt, uint64_t seed,
                             int threads) {
    inferix_stream* made = nullptr;
    succeeded([&] {
        auto engine = std::make_shared<const inferix::Engine>(text(folder, "folder"), threads);
        std::optional<std::string> negative;
        if (negative_prompt != nullptr) negative = negative_prompt;
        made = new inferix_stream{inferix::Stream(engine, text(prompt, "prompt"), seed, {}, negative), {}};
    });
    return made;
}

int inferix_prompt(inferix_stream* stream, const char* prompt) {
    return succeeded([&] { given(stream, "stream").stream.prompt(text(prompt, "prompt")); }) ? 0 : -1;
}

int inferix_act(inferix_stream* stream, const char* action) {
    return succeeded([&] { given(stream, "stream").stream.act(text(action, "action")); }) ? 0 : -1;
}

int inferix_next_block(inferix_stream* stream, inferix_block* block) {
    return succeeded([&] {
        inferix_block& result = given(block, "block");
        inferix::MadeBlock& made = given(stream, "stream").block = stream->stream.next_block();
        std::vector<int64_t> size = stream->stream.engine().plan.at("size").at("picture").integers();
        const inferix::Shape& shape = made.latents.shape;
        result = {made.index, made.frames.data(), made.pictures, size[1], size[0], made.latents.data.data(),
                  shape[0], shape[1], shape[2], shape[3]};
    }) ? 0 : -1;
}

int inferix_save(const inferix_stream* stream, const char* path) {
    return succeeded([&] { given(stream, "stream").stream.save(text(path, "path")); }) ? 0 : -1;
}

inferix_stream* inferix_restore(const char* folder, const char* path, int threads) {
    inferix_stream* made = nullptr;
    succeeded([&] {
        auto engine = std::make_shared<const inferix::Engine>(text(folder, "folder"), threads);
        made = new inferix_stream{inferix::Stream::restore(engine, text(path, "path")), {}};
    });
    return made;
}

void inferix_close(inferix_stream* stream) { delete stream; }

const char* inferix_error() { return last_error.c_str(); }
